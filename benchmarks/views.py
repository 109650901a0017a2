"""Measures the CPU time of a view, with and without repeats, beside torchvision's own pipeline.

    .venv/bin/python benchmarks/views.py --images DIR [--repeats 4] [--size 224] [--rounds 4]

DIR is a folder with one folder of images a class. The variants take turns, and every one of them
makes equally many views of every image in a round. A training step is one of a network so small
that its views take nearly all of it: on labels alone without repeats, and on a recording with them.
Prints a Markdown table: medians over rounds, with the least and the largest ratio.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.format.recipe import AugmentConfig
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare, run_local
from cache_service.views.replay import Views
from distill.config import TrainConfig
from distill.trainer import train

BATCH = 64
PRESET = "imagenet"


class TinyNet(nn.Module):
    """A network whose step takes a few milliseconds at 224 px."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_features = 16
        self.body = nn.Sequential(nn.Conv2d(3, 16, 16, stride=16), nn.ReLU())
        self.head = nn.Linear(16, num_classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Logits [B, C]."""
        logits_BC: Tensor = self.head(self.body(images_B3HW).mean(dim=(2, 3)))
        return logits_BC


def tiny_net(num_classes: int) -> TinyNet:
    """The network, by name."""
    return TinyNet(num_classes)


def torchvision_views(paths: list[str], size: int) -> Callable[[], object]:
    """An epoch by torchvision: decode, crop, resize, flip, one tensor a batch."""
    pipeline = v2.Compose(
        [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )

    def one_epoch() -> None:
        for start in range(0, len(paths), BATCH):
            torch.stack([pipeline(default_loader(path)) for path in paths[start : start + BATCH]])

    return one_epoch


def own_views(views: Views, seeds: Iterator[int], *, recording: bool) -> Callable[[], object]:
    """The next seed, as a recording or a training run renders it."""

    def one_seed() -> None:
        seed, count = next(seeds), len(views.dataset)
        for start in range(0, count, BATCH):
            positions = np.arange(start, min(start + BATCH, count))
            views.render(seed, positions, with_origins=recording)

    return one_seed


def training(folder: str, dataset: dict[str, Any], size: int, repeats: int) -> dict[str, Any]:
    """A run of `repeats` epochs on labels alone, and one on a recording with repeats."""
    model = f"{Path(__file__)}:tiny_net"
    augment = {"preset": PRESET, "size": size}
    teacher = {"model": model, "allow_untrained": True}
    build = {"cache": f"{folder}/cache", "dataset": dataset, "teacher": teacher, "workers": 0}
    build |= {"augment": augment | {"repeats": repeats}, "seeds": f"0:{repeats}", "device": "cpu"}
    opened = open_build(BuildConfig.model_validate(build))
    prepare(opened)
    run_local(opened, seeds=opened.config.seeds)
    common = {"dataset": dataset, "student": {"model": model}, "epochs": repeats, "workers": 0}
    common |= {"batch_size": BATCH, "device": "cpu", "optimizer": {"name": "sgd", "lr": 0.01}}
    labels = common | {"augment": augment, "method": {"name": "ce"}}
    recorded = common | {"caches": f"{folder}/cache", "method": {"name": "kd"}}
    return {"labels": labels, "recorded": recorded}


def train_once(document: dict[str, Any]) -> Callable[[], object]:
    """A whole run in a folder of its own."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as out:
            train(TrainConfig.model_validate(document | {"out": out}))

    return run


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process."""
    began = time.process_time()
    work()
    return time.process_time() - began


def measure(arguments: argparse.Namespace, folder: str) -> dict[str, list[float]]:
    """CPU seconds of each variant in each round: `repeats` epochs of every image."""
    section = {"name": "folder", "root": arguments.images}
    images = open_dataset(DatasetConfig.model_validate(section))
    paths = [images.describe(sample) for sample in range(len(images))]
    repeats, size = arguments.repeats, arguments.size
    variants: dict[str, Callable[[], object]] = {"torchvision": torchvision_views(paths, size)}
    for count in (1, repeats):
        recipe = AugmentConfig(preset=PRESET, size=size, repeats=count).recipe()
        for recording in (True, False):
            name = f"{'recording' if recording else 'training'}, repeats: {count}"
            seeds = iter(range(10**9))
            variants[name] = own_views(Views(recipe, images), seeds, recording=recording)
    runs = training(folder, section, size, repeats)
    steps = {f"step on {name}": train_once(document) for name, document in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in (*variants, *steps)}
    for _ in range(arguments.rounds):
        for name, work in variants.items():
            found[name].append(sum(cpu_seconds(work) for _ in range(repeats)))
        for name, work in steps.items():
            found[name].append(cpu_seconds(work))
    per_view = repeats * len(images)
    return {name: [value / per_view for value in values] for name, values in found.items()}


def describe(found: dict[str, list[float]], repeats: int) -> str:
    """The table."""

    def ratio(name: str, other: str) -> str:
        ratios = [a / b for a, b in zip(found[name], found[other], strict=True)]
        return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"

    pairs = {
        "recording, repeats: 1": "torchvision",
        "training, repeats: 1": "torchvision",
        f"recording, repeats: {repeats}": "recording, repeats: 1",
        f"training, repeats: {repeats}": "training, repeats: 1",
        "step on recorded": "step on labels",
    }
    lines = ["| | CPU ms a view | ratio | to |", "|---|---|---|---|"]
    for name, values in found.items():
        other = pairs.get(name, "")
        shown = ratio(name, other) if other else "1"
        lines.append(f"| {name} | {1000 * statistics.median(values):.2f} | {shown} | {other} |")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", required=True)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(sys.stdout):
        found = measure(arguments, folder)
    sys.stdout.write(describe(found, arguments.repeats) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
