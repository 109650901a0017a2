"""A training loop of your own over a recorded teacher, end to end on scikit-learn's digits.

    python examples/own_loop.py

trains a small teacher, records it over four seeds, and trains a student from the recording with
plain PyTorch: no trainer of this package, no teacher in memory. It takes seconds on a CPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cache_service.datasets import DatasetConfig, ImageDataset, open_dataset
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare, run_local
from distill import CachedDataset, load_cache
from distill.config import TrainConfig
from distill.losses import kd_loss, label_loss
from distill.trainer import train

SEEDS = 4


def small_net(num_classes: int = 10, width: int = 32) -> nn.Module:
    """Two convolutions and a linear head, for 8 x 8 digits."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, num_classes),
    )


def normalize(view_3HW: Tensor) -> Tensor:
    """A uint8 view to the -1 to 1 scale."""
    return view_3HW.float() / 127.5 - 1


def train_teacher(folder: Path, epochs: int = 15) -> Path:
    """A teacher learns from labels alone, with the package's own trainer. Returns its weights."""
    settings: dict[str, Any] = {
        "dataset": {"name": "digits"},
        "augment": {"ops": [{"op": "pad_crop", "padding": 1}], "size": 8},
        "student": {"model": f"{__name__}:small_net"},
        "method": {"name": "ce"},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "epochs": epochs,
        "batch_size": 64,
        "workers": 0,
        "device": "cpu",
        "out": str(folder / "teacher"),
    }
    train(TrainConfig.model_validate(settings))
    return folder / "teacher" / "student.safetensors"


def record(folder: Path, weights: Path) -> str:
    """What `kd-cache build` does, from Python. Returns where the cache is."""
    settings: dict[str, Any] = {
        "cache": str(folder / "cache"),
        "dataset": {"name": "digits"},
        "augment": {"ops": [{"op": "pad_crop", "padding": 1}], "size": 8},
        "seeds": f"0:{SEEDS}",
        "teacher": {
            "model": f"{__name__}:small_net",
            "checkpoint": str(weights),
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
        },
        "device": "cpu",
    }
    build = open_build(BuildConfig.model_validate(settings))
    prepare(build)
    run_local(build, seeds=build.config.seeds)
    return build.config.cache


def train_student(url: str, digits: ImageDataset, student: nn.Module, epochs: int = 12) -> None:
    """The loop that you would write. The teacher is not here: its answers are in the batches."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    # README: from here
    cache = load_cache(url)
    for epoch in range(epochs):
        # Each seed is a recorded epoch: other crops in another order, already shuffled.
        data = CachedDataset(cache, images=digits, seed=epoch % SEEDS, transform=normalize)
        for images, labels, teacher_logits in DataLoader(data, batch_size=64):
            logits = student(images)
            soft = kd_loss(logits, teacher_logits, temperature=4.0)
            loss = 0.1 * label_loss(logits, labels) + 0.9 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    # README: to here


@torch.inference_mode()
def accuracy(student: nn.Module, digits: ImageDataset) -> float:
    """Fraction of the test digits that are classified correctly."""
    right = 0
    for image, label in (digits[i] for i in range(len(digits))):
        pixels_HW3 = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        view_3HW = pixels_HW3.view(image.height, image.width, 3).permute(2, 0, 1)
        right += int(student(normalize(view_3HW)[None]).argmax() == label)
    return right / len(digits)


def main(folder: Path) -> float:
    """The whole of it, below one folder. Returns the student's accuracy."""
    url = record(folder, train_teacher(folder))
    torch.manual_seed(0)
    student = small_net(width=8)
    train_student(url, open_dataset(DatasetConfig(name="digits")), student)
    return accuracy(student.eval(), open_dataset(DatasetConfig(name="digits", split="test")))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        print(f"student alone: {main(Path(name)):.1%} of the test digits")
