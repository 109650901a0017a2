"""Measures the CPU time of the batches of either loader, and of training steps on them.

    .venv/bin/python benchmarks/loader.py [--samples 5000] [--rounds 5] [--steps 20]

The images are random, of 32 px like those of CIFAR-100, of 100 classes, and in memory.
A round is an epoch of a seed that was not read before, by `loader: workers` in this process and by
`loader: device` on the CPU, in turn. The epoch of the latter includes what it does when it begins:
draws, rows, and the comparison of every view with its digest. Prints a Markdown table: medians over
rounds, with the least and the largest ratio.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare, run_local
from distill.batches import Batch
from distill.config import TrainConfig
from distill.finite import NonFiniteCheck
from distill.step import TrainContext, train_step
from distill.stream import open_stream
from distill.students import make_student_state

CPU = torch.device("cpu")
SIDE, CLASSES, BATCH = 32, 100, 64

RECIPES: dict[str, list[dict[str, Any]]] = {
    "pad_crop, horizontal_flip": [{"op": "pad_crop"}, {"op": "horizontal_flip"}],
    "the same, random_erasing (noise), mixup, cutmix": [
        {"op": "pad_crop"},
        {"op": "horizontal_flip"},
        {"op": "random_erasing", "fill": "noise"},
        {"op": "mixup"},
        {"op": "cutmix"},
    ],
}


class InMemory:
    """Random images in memory, as a dataset of small images holds them."""

    def __init__(self, num_samples: int) -> None:
        rng = np.random.default_rng(0)
        self._pixels = rng.integers(0, 256, (num_samples, SIDE, SIDE, 3), dtype=np.uint8)
        self.targets = [sample % CLASSES for sample in range(num_samples)]
        self.classes = [f"class{label}" for label in range(CLASSES)]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, sample: int) -> tuple[Image.Image, int]:
        """Image and label."""
        return Image.fromarray(self._pixels[sample]), self.targets[sample]


def in_memory(num_samples: int) -> InMemory:
    """The dataset, by name."""
    return InMemory(num_samples)


def tiny_net(num_classes: int) -> nn.Module:
    """A teacher that costs little, by name."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, num_classes))


class LoaderRun(NamedTuple):
    """The loader of one setting, and a student that trains on its batches."""

    batches: Iterator[Batch]
    context: TrainContext
    student: Any
    steps_per_epoch: int

    def read_epoch(self) -> float:
        """CPU seconds to make a batch, over one epoch."""
        began = time.process_time()
        for _ in itertools.islice(self.batches, self.steps_per_epoch):
            pass
        return (time.process_time() - began) / self.steps_per_epoch

    def train_steps(self, steps: int) -> float:
        """CPU seconds of a step, its batch included. The rest of the epoch is skipped."""
        began = time.process_time()
        for batch in itertools.islice(self.batches, steps):
            train_step(self.context, [self.student], [batch])
        seconds = (time.process_time() - began) / steps
        for _ in itertools.islice(self.batches, self.steps_per_epoch - steps):
            pass
        return seconds


def open_runs(folder: str, ops: list[dict[str, Any]], samples: int, rounds: int) -> list[LoaderRun]:
    """Record the seeds of all rounds, and open both loaders on them."""
    dataset = {"name": f"{Path(__file__)}:in_memory", "args": {"num_samples": samples}}
    teacher = {"model": f"{Path(__file__)}:tiny_net", "allow_untrained": True}
    build = {"cache": f"{folder}/cache", "dataset": dataset, "teacher": teacher, "workers": 0}
    build |= {"augment": {"size": SIDE, "ops": ops}, "seeds": f"0:{2 * rounds}", "device": "cpu"}
    opened = open_build(BuildConfig.model_validate(build))
    prepare(opened)
    run_local(opened, seeds=opened.config.seeds)
    runs = []
    for loader in ("workers", "device"):
        document = {
            "dataset": dataset,
            "caches": f"{folder}/cache",
            "student": {"model": "resnet8x4"},
            "method": {"name": "kd"},
            "optimizer": {"name": "sgd", "lr": 0.01},
            "epochs": 2 * rounds,
            "batch_size": BATCH,
            "workers": 0,
            "device": "cpu",
            "loader": loader,
            "out": f"{folder}/{loader}",
        }
        config = TrainConfig.model_validate(document)
        stream = open_stream(config, device=CPU, methods=[config.method])
        context = TrainContext(stream, CPU, NonFiniteCheck(CPU))
        student = make_student_state(config, stream, CPU)
        steps = stream.facts.plan.steps_per_epoch
        runs.append(LoaderRun(stream.batches(0), context, student, steps))
    return runs


def measure(arguments: argparse.Namespace) -> str:
    """The table."""
    lines = ["| recipe | what | workers, ms | device, ms | ratio |", "|---|---|---|---|---|"]
    for recipe, ops in RECIPES.items():
        found: dict[str, list[list[float]]] = {"a batch": [], "a step, resnet8x4, KD": []}
        with tempfile.TemporaryDirectory() as folder:
            runs = open_runs(folder, ops, arguments.samples, arguments.rounds)
            for _ in range(arguments.rounds):
                found["a batch"].append([each.read_epoch() for each in runs])
                steps = [each.train_steps(arguments.steps) for each in runs]
                found["a step, resnet8x4, KD"].append(steps)
        for what, rounds in found.items():
            ratios = [device / workers for workers, device in rounds]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            medians = [1000 * statistics.median(column) for column in zip(*rounds, strict=True)]
            lines.append(f"| {recipe} | {what} | {medians[0]:.2f} | {medians[1]:.2f} | {spread} |")
    return "\n".join(lines)


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with redirect_stderr(sys.stdout):
        table = measure(arguments)
    sys.stdout.write(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
