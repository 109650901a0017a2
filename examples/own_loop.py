"""A training loop of your own over a recorded teacher, in plain PyTorch: docs/loops.md."""

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.models.create import create_model
from distill import CachedDataset, load_cache
from distill.losses import kd_loss


def train(cache, images, student, *, epochs=8, batch_size=64, **loader_options):
    """Train the student. Returns the loss of each step."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    losses = []
    data = CachedDataset(cache, images, seeds=cache.complete_seeds())
    loader = DataLoader(data, batch_size, **loader_options)
    for epoch in range(epochs):
        data.set_epoch(epoch)  # the next seed: other crops in another order, already shuffled
        for views, labels, teacher_logits in loader:
            logits = student(2 * views - 1)  # views are 0 to 1
            soft = kd_loss(logits, teacher_logits, temperature=4.0)
            loss = 0.1 * cross_entropy(logits, labels) + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    digits = open_dataset(DatasetConfig(name="digits"))
    student = create_model("resnet20", num_classes=10)
    losses = train(load_cache("caches/digits-whole"), digits, student)
    print(f"loss {losses[0]:.2f} at the first step, {losses[-1]:.2f} at the last")
