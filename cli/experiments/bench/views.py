"""`bench views`: the CPU time of a view beside torchvision's own pipeline, and of several views
from one decode.

The variants take turns, and every one of them makes equally many views of every image in a round.
A training step is one of a network so small that its views take nearly all of it: on labels alone
without repeats, and on a recording with them.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from cache_service.datasets import DatasetConfig, ImageDataset, open_dataset
from cache_service.format.recipe import AugmentConfig
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare, run_local
from cache_service.views.replay import Views
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, Goal, spread
from cli.experiments.bench.pairs import NUM_JPEGS, jpeg_file
from distill.config import TrainConfig
from distill.trainer import train

REPEATS = 4
"""Views of one decode."""

BATCH = 64
SMALL_SIDE = 32
NUM_CLASSES = 2

REPEATS_GOAL = 2.4
"""Smallest wanted ratio of the views per CPU second to those of single views, of JPEG files."""

STEP_GOAL = 0.85
"""Largest wanted ratio of a step to one on labels alone, where views take nearly all of it."""

TORCHVISION = "torchvision"
LABELS, RECORDED = "step on labels alone", f"step on a recording, repeats: {REPEATS}"

SINGLE, SEVERAL = "training, repeats: 1", f"training, repeats: {REPEATS}"

Work = Callable[[], object]

_v2: Any = v2
"""It exports its transforms without saying so to type checkers."""


class Sizes(NamedTuple):
    """How much is measured: rounds, small images, and the side of views of photographs."""

    rounds: int
    small: int
    side: int


FULL = Sizes(rounds=9, small=512, side=224)
QUICK = Sizes(rounds=1, small=16, side=24)


class Subject(NamedTuple):
    """Images, and how their views are made.

    Attributes:
        name: for the table.
        dataset: of a build file.
        load: an image by number, as torchvision's datasets read it.
        num_images: how many.
        preset: recipe of the views.
        size: side of the views, px.
        same: torchvision's transforms that make such views.
        steps: whether training steps are measured, too.
    """

    name: str
    dataset: dict[str, Any]
    load: Callable[[int], Image.Image]
    num_images: int
    preset: str
    size: int
    same: list[nn.Module]
    steps: bool


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
    """Factory for `model: cli.experiments.bench.views:tiny_net`."""
    return TinyNet(num_classes)


class SmallImages:
    """Images in memory, kept and read as torchvision keeps CIFAR."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.data = rng.integers(0, 256, (count, SMALL_SIDE, SMALL_SIDE, 3), dtype=np.uint8)
        self.targets = [sample % NUM_CLASSES for sample in range(count)]
        self.classes = [f"class{label}" for label in range(NUM_CLASSES)]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.data)

    def __getitem__(self, sample: int) -> tuple[Image.Image, int]:
        """Image and label."""
        return Image.fromarray(self.data[sample]), self.targets[sample]


def small_images(**arguments: int) -> SmallImages:
    """Factory for `dataset: {name: cli.experiments.bench.views:small_images}`."""
    return SmallImages(**arguments)


def measure_views(options: BenchOptions) -> Iterator[Figures]:
    """Measure small images in memory, the same as PNG files, and photographs as JPEG files."""
    sizes = QUICK if options.quick else FULL
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as name:
        folder = Path(name)
        for make in (_in_memory, _png_files, _jpeg_files):
            subject = make(folder, sizes, options)
            options.on_message(f"{subject.name}: {sizes.rounds} rounds of every variant")
            yield _measure(subject, folder, sizes)


# The images.


def _in_memory(folder: Path, sizes: Sizes, options: BenchOptions) -> Subject:
    del folder, options
    images = SmallImages(sizes.small)
    dataset = {"name": f"{__name__}:small_images", "args": {"count": sizes.small}}
    return _small("32 px, in memory", dataset, lambda sample: images[sample][0], sizes.small)


def _png_files(folder: Path, sizes: Sizes, options: BenchOptions) -> Subject:
    del options
    root = folder / "small"
    images = SmallImages(sizes.small)
    for sample in range(sizes.small):
        image, label = images[sample]
        file = root / images.classes[label] / f"{sample}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    source = _folder(root)
    return _small("32 px, PNG files", _section(root), _loader(source), len(source))


def _small(
    name: str, dataset: dict[str, Any], load: Callable[[int], Image.Image], count: int
) -> Subject:
    same: list[nn.Module] = [_v2.RandomCrop(SMALL_SIDE, padding=4), _v2.RandomHorizontalFlip()]
    return Subject(name, dataset, load, count, "cifar", SMALL_SIDE, same, steps=False)


def _jpeg_files(folder: Path, sizes: Sizes, options: BenchOptions) -> Subject:
    """The user's photographs, or generated ones."""
    root = Path(options.images or folder / "photos")
    if options.images is None:
        for number in range(NUM_JPEGS):
            file = root / f"class{number % NUM_CLASSES}" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg_file(number))
    source = _folder(root)
    same = [_v2.RandomResizedCrop(sizes.side, antialias=True), _v2.RandomHorizontalFlip()]
    kind = "generated JPEG files" if options.images is None else "JPEG files"
    return Subject(
        f"{len(source)} {kind}",
        _section(root),
        _loader(source),
        len(source),
        "imagenet",
        sizes.side,
        same,
        steps=True,
    )


def _section(root: Path) -> dict[str, Any]:
    return {"name": "folder", "root": str(root)}


def _folder(root: Path) -> ImageDataset:
    return open_dataset(DatasetConfig.model_validate(_section(root)))


def _loader(source: ImageDataset) -> Callable[[int], Image.Image]:
    paths = [source.describe(sample) for sample in range(len(source))]
    return lambda sample: default_loader(paths[sample])


# The variants.


def _torchvision_epoch(subject: Subject) -> Work:
    """An epoch by torchvision: decode, augment, one tensor a batch."""
    pipeline = _v2.Compose([*subject.same, _v2.PILToTensor()])

    def one_epoch() -> None:
        for start in range(0, subject.num_images, BATCH):
            samples = range(start, min(start + BATCH, subject.num_images))
            torch.stack([pipeline(subject.load(sample)) for sample in samples])

    return one_epoch


def _own_epoch(views: Views, *, recording: bool) -> Work:
    """The next seed, as a recording or a training run renders it."""
    seeds = iter(range(10**9))

    def one_seed() -> None:
        seed, count = next(seeds), len(views.dataset)
        for start in range(0, count, BATCH):
            positions = np.arange(start, min(start + BATCH, count))
            views.render(seed, positions, with_origins=recording)

    return one_seed


def _repeated(work: Work) -> Work:
    """As many views of every image as one decode gives."""

    def every_view() -> None:
        for _ in range(REPEATS):
            work()

    return every_view


def _variants(subject: Subject, folder: Path) -> dict[str, tuple[Work, str]]:
    """Each variant by name, and the variant that it is compared with."""
    source = open_dataset(DatasetConfig.model_validate(subject.dataset))
    variants = {TORCHVISION: (_repeated(_torchvision_epoch(subject)), TORCHVISION)}
    for repeats in (1, REPEATS):
        recipe = AugmentConfig(preset=subject.preset, size=subject.size, repeats=repeats).recipe()
        for use in ("recording", "training"):
            work = _repeated(_own_epoch(Views(recipe, source), recording=use == "recording"))
            beside = TORCHVISION if repeats == 1 else _name(use, 1)
            variants[_name(use, repeats)] = work, beside
    if subject.steps:
        variants |= _steps(subject, folder)
    return variants


def _name(use: str, repeats: int) -> str:
    return f"{use}, repeats: {repeats}"


def _steps(subject: Subject, folder: Path) -> dict[str, tuple[Work, str]]:
    """A run of `REPEATS` epochs on labels alone, and one on a recording with repeats."""
    model = f"{__name__}:tiny_net"
    augment = {"preset": subject.preset, "size": subject.size}
    dataset, cache = {"dataset": subject.dataset}, str(folder / "cache")
    build = dataset | {
        "cache": cache,
        "teacher": {"model": model, "allow_untrained": True},
        "augment": augment | {"repeats": REPEATS},
        "seeds": f"0:{REPEATS}",
        "workers": 0,
        "device": "cpu",
    }
    opened = open_build(BuildConfig.model_validate(build))
    prepare(opened)
    run_local(opened, seeds=opened.config.seeds)
    common = dataset | {
        "student": {"model": model},
        "epochs": REPEATS,
        "batch_size": BATCH,
        "workers": 0,
        "device": "cpu",
        "optimizer": {"name": "sgd", "lr": 0.01},
    }
    labels = common | {"augment": augment, "method": {"name": "ce"}}
    recorded = common | {"caches": cache, "method": {"name": "kd"}}
    return {LABELS: (_run(labels), LABELS), RECORDED: (_run(recorded), LABELS)}


def _run(document: dict[str, Any]) -> Work:
    """A whole run in a folder of its own."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as out:
            train(TrainConfig.model_validate(document | {"out": out}))

    return run


def _measure(subject: Subject, folder: Path, sizes: Sizes) -> Figures:
    """CPU seconds a view of each variant in each round, and what they are beside."""
    variants = _variants(subject, folder)
    names, views = list(variants), REPEATS * subject.num_images
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(sizes.rounds):
        # A different variant begins each round, so that none always follows the same one.
        first = number % len(names)
        for name in names[first:] + names[:first]:
            began = time.process_time()
            variants[name][0]()
            seconds[name].append((time.process_time() - began) / views)
    return [
        {
            "images": subject.name,
            "variant": name,
            "cpu_seconds_a_view": seconds[name],
            "beside": beside,
            "ratios": [a / b for a, b in zip(seconds[name], seconds[beside], strict=True)],
        }
        for name, (_, beside) in variants.items()
    ]


def views_page(figures: Figures, options: BenchOptions) -> BenchPage:
    """The page of the figures."""
    del options
    return BenchPage(
        name="views",
        title="CPU time of a view, and several views from one decode",
        notes=[
            (
                "CPU time of one process, medians over rounds in which the variants take turns, "
                "with the least and the largest ratio. A view of kd-cache includes its digest, "
                "and in a recording also the checksum of the decoded image; torchvision decodes, "
                "crops, flips and makes a tensor. A step is one of a tiny network, whole runs "
                "with the opening of the dataset included."
            ),
        ],
        header=("images", "variant", "ms a view", "ratio", "to"),
        rows=[
            [
                figure["images"],
                figure["variant"],
                f"{1000 * statistics.median(figure['cpu_seconds_a_view']):.3f}",
                *(
                    ("1", "")
                    if figure["beside"] == figure["variant"]
                    else (spread(figure["ratios"]), figure["beside"])
                ),
            ]
            for figure in figures
        ],
        figures=figures,
        goals=_goals(figures),
    )


def _goals(figures: Figures) -> list[Goal]:
    """Single views of everything; several of one decode where decoding takes long."""
    goals = []
    for figure in figures:
        images, variant = figure["images"], figure["variant"]
        ratio = statistics.median(figure["ratios"])
        if figure["beside"] == TORCHVISION != variant:
            goals.append(Goal(f"{images}, {variant}: time of a view / torchvision", 1.0, ratio))
        elif variant == RECORDED:
            goals.append(Goal(f"{images}, {variant}: time / labels alone", STEP_GOAL, ratio))
        elif "JPEG" in images and figure["beside"] in (_name("recording", 1), _name("training", 1)):
            what = f"{images}, {variant}: views per CPU second / repeats: 1"
            goals.append(Goal(what, REPEATS_GOAL, 1 / ratio, at_least=True))
    return goals
