"""Lightning over a recorded teacher, on one or several devices: docs/loops.md."""

import lightning
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.models.create import create_model
from distill import CachedDataset, load_cache
from distill.losses import kd_loss


class Distillation(lightning.LightningModule):
    def __init__(self, data, student, batch_size=64, **loader_options):
        super().__init__()
        self.data, self.student = data, student
        self.loader_options = {"batch_size": batch_size, **loader_options}

    def train_dataloader(self):  # here the processes know each other
        sampler = self.data.sampler(batch_size=self.loader_options["batch_size"])
        return DataLoader(self.data, sampler=sampler, **self.loader_options)

    def training_step(self, batch, index):
        views, labels, teacher_logits = batch
        logits = self.student(2 * views - 1)
        soft = kd_loss(logits, teacher_logits, temperature=4.0)
        return 0.1 * cross_entropy(logits, labels) + 0.9 * soft

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)


if __name__ == "__main__":
    cache, digits = load_cache("caches/digits-whole"), open_dataset(DatasetConfig(name="digits"))
    data = CachedDataset(cache, digits, seeds=cache.complete_seeds())
    module = Distillation(data, create_model("resnet20", num_classes=10))
    lightning.Trainer(max_epochs=8, use_distributed_sampler=False).fit(module)
