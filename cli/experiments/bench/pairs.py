"""The pairs of networks that benchmarks run, the images they see, and their build and train files.

The images are noise: speed and memory do not depend on what is on them. Large ones are JPEG files
in memory of ImageNet's usual size, so that views cost what they cost in practice.
"""

from __future__ import annotations

import io
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cache_service.errors import ConfigError
from cache_service.recording.build_config import BuildConfig
from distill.config import TrainConfig

JPEG_SIDES = (500, 375)
"""Width and height of most images of ImageNet, px."""

NUM_JPEGS = 16
"""Different files; the images of a dataset take them in turn."""

SMALL_SIDE = 64
"""Views of at most this side, px, are cut from small images, as those of CIFAR are."""

MAX_WORKERS = 12
"""Loader processes at most; two cores are left to the networks."""


class Pair(NamedTuple):
    """A teacher, a student, and what they look at.

    Attributes:
        teacher, student: names of networks.
        size: side of the views, px.
        num_classes: of the dataset.
        batch_size: of the student.
        scales: grids of cells that are recorded for scale decoupled methods; (1,) if the teacher
            has no cells.
    """

    teacher: str
    student: str
    size: int
    num_classes: int
    batch_size: int
    scales: tuple[int, ...]

    @property
    def name(self) -> str:
        """As the command line takes it."""
        return f"{self.teacher}:{self.student}"

    @property
    def is_small(self) -> bool:
        """Whether the views are those of CIFAR: cut from small images by copying pixels."""
        return self.size <= SMALL_SIDE

    @property
    def has_cells(self) -> bool:
        """Whether scale decoupled methods can learn from the teacher."""
        return self.scales != (1,)


TINY = Pair("resnet8x4", "resnet8x4", 16, 10, 32, (1, 2))
"""Takes seconds on one CPU core."""

PAIRS = {
    pair.name: pair
    for pair in (
        TINY,
        Pair("resnet32x4", "resnet8x4", 32, 100, 64, (1, 2, 4)),
        Pair("resnet50", "resnet18", 224, 1000, 128, (1, 2, 4)),
        # The head of a ViT reads a class token, so there is no map to cut into cells.
        Pair("vit_large_patch16_224", "resnet18", 224, 1000, 128, (1,)),
    )
}


def pair_title(figure: dict[str, Any]) -> str:
    """Return the pair of a figure as tables name it."""
    return str(figure["pair"]).replace(":", " -> ")


def find_pairs(names: tuple[str, ...], *, quick: bool, on_gpu: bool) -> list[Pair]:
    """Return the requested pairs.

    By default those of published tables, on a CPU those for CIFAR; only the smallest if `quick`.

    Raises:
        ConfigError: a pair is not known. The hint lists those that are.
    """
    if not names:
        if quick:
            return [TINY]
        return [pair for pair in PAIRS.values() if pair != TINY and (on_gpu or pair.is_small)]
    for name in names:
        if name not in PAIRS:
            raise ConfigError(
                f"--pair {name} is not known.", hint=f"Use one of {', '.join(PAIRS)}."
            )
    return [PAIRS[name] for name in names]


class Noise:
    """Random images, the same in every process: image i is a function of i."""

    def __init__(self, num_samples: int, size: int, num_classes: int) -> None:
        self.targets = [sample % num_classes for sample in range(num_samples)]
        self.classes = [f"class{label}" for label in range(num_classes)]
        self._size = size

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, sample: int) -> tuple[Image.Image, int]:
        """Image and label."""
        if self._size > SMALL_SIDE:
            return Image.open(io.BytesIO(jpeg_file(sample % NUM_JPEGS))), self.targets[sample]
        rng = np.random.default_rng(sample)
        pixels = rng.integers(0, 256, (self._size, self._size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), self.targets[sample]


@lru_cache(maxsize=NUM_JPEGS)
def jpeg_file(number: int) -> bytes:
    """A JPEG file of about 110 kB, as ImageNet's are: large patches of color under fine grain."""
    rng = np.random.default_rng(number)
    patches = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(patches.resize(JPEG_SIDES, Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.normal(0, 16, pixels.shape[:2])[..., None]
    file = io.BytesIO()
    noisy = np.clip(pixels + grain, 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(file, "JPEG", quality=88)
    return file.getvalue()


def noise(**arguments: int) -> Noise:
    """Factory for `dataset: {name: cli.experiments.bench.pairs:noise}`."""
    return Noise(**arguments)


def loader_workers(device: str) -> int:
    """Loader processes for a run: none on small machines, where they would take the cores."""
    cores = len(os.sched_getaffinity(0))
    return min(MAX_WORKERS, cores - 2) if device.startswith("cuda") and cores > 4 else 0


def build_file(
    pair: Pair, folder: str | Path, *, device: str, num_samples: int, seeds: int = 1
) -> BuildConfig:
    """Return the build file of a pair: its teacher with random weights over noise."""
    sizes = {"num_samples": num_samples, "size": pair.size, "num_classes": pair.num_classes}
    on_gpu = device.startswith("cuda")
    return BuildConfig.model_validate(
        {
            "cache": str(Path(folder, "cache")),
            "dataset": {"name": f"{__name__}:noise", "args": sizes},
            "augment": {"preset": "cifar" if pair.is_small else "imagenet", "size": pair.size},
            "teacher": {
                "model": pair.teacher,
                "num_classes": pair.num_classes,
                "allow_untrained": True,
                "input_size": pair.size,
                "precision": "bfloat16" if on_gpu else "float32",
            },
            "scales": list(pair.scales),
            "seeds": f"0:{seeds}",
            "batch_size": 256 if on_gpu else pair.batch_size,
            "workers": loader_workers(device),
            "device": device,
        }
    )


def train_file(
    pair: Pair, build: BuildConfig, *, method: str, cached: bool, out: str | Path, **changed: Any
) -> TrainConfig:
    """Return the train file of a student that learns on the views of a build.

    Args:
        pair: the networks.
        build: the build whose dataset, recipe and seeds the student takes.
        method: name of the method.
        cached: learn from the cache; else from labels or a live teacher on the same views.
        out: output folder.
        changed: further keys of the train file.
    """
    on_gpu = build.device.startswith("cuda")
    source: dict[str, Any] = {"caches": build.cache}
    if not cached:
        augment = build.augment.model_dump(exclude_none=True)
        source = {"augment": augment, "seeds": list(build.seeds)}
    document = {
        "dataset": build.dataset,
        "student": {"model": pair.student, "input_size": pair.size},
        "method": {"name": method},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "epochs": len(build.seeds),
        "batch_size": pair.batch_size,
        "workers": build.workers or 0,
        "amp": "bfloat16" if on_gpu else "none",
        "channels_last": on_gpu,
        "device": build.device,
        "out": str(out),
        "log_every": 1000,
    }
    return TrainConfig.model_validate(document | source | changed)
