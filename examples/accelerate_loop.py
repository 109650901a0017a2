"""Hugging Face Accelerate over a recorded teacher, on one or several processes: docs/loops.md."""

import torch
from accelerate import Accelerator
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.models.create import create_model
from distill import CachedDataset, load_cache
from distill.losses import kd_loss


def train(cache, images, student, *, epochs=8, batch_size=64, accelerator=None, **loader_options):
    """Train the student. Returns the loss of each step of this process."""
    accelerator = accelerator or Accelerator()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    data = CachedDataset(cache, images, seeds=cache.complete_seeds())
    # Processes get whole batches in turn; without drop_last, the last round repeats old views.
    drop_last = accelerator.num_processes > 1
    loader = DataLoader(data, batch_size, drop_last=drop_last, **loader_options)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    for epoch in range(epochs):
        loader.set_epoch(epoch)  # also sets that of the data
        for views, labels, teacher_logits in loader:
            with accelerator.accumulate(student):
                logits = student(2 * views - 1)
                soft = kd_loss(logits, teacher_logits, temperature=4.0)
                loss = 0.1 * cross_entropy(logits, labels) + 0.9 * soft
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    digits = open_dataset(DatasetConfig(name="digits"))
    train(load_cache("caches/digits-whole"), digits, create_model("resnet20", num_classes=10))
