"""The Trainer of Hugging Face transformers over a recorded teacher: docs/loops.md."""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.models.create import create_model
from distill import CachedDataset, load_cache
from distill.losses import kd_loss


class DistillationTrainer(Trainer):
    loss_is_scaled_for_ga = False  # compute_loss gives the mean of one batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        answer = model(2 * inputs["views"] - 1)
        logits = getattr(answer, "logits", answer)
        soft = kd_loss(logits, inputs["teacher_logits"], temperature=4.0)
        loss = 0.1 * cross_entropy(logits, inputs["labels"]) + 0.9 * soft
        return (loss, {"logits": logits}) if return_outputs else loss


def collate(items):
    # Named here, because the Trainer drops parts of items that `forward` does not name.
    return dict(zip(("views", "labels", "teacher_logits"), default_collate(items), strict=True))


def trainer_of(cache, images, student, kind=DistillationTrainer, **settings):
    settings |= {"train_sampling_strategy": "sequential", "label_names": ["labels"]}
    optimizer = torch.optim.SGD(student.parameters(), settings["learning_rate"], momentum=0.9)
    data = CachedDataset(cache, images, seeds=cache.complete_seeds())
    return kind(student, TrainingArguments(**settings), collate, data, optimizers=(optimizer, None))


if __name__ == "__main__":
    digits = open_dataset(DatasetConfig(name="digits"))
    student = create_model("resnet20", num_classes=10)
    trainer_of(load_cache("caches/digits-whole"), digits, student, learning_rate=0.05).train()
