"""ImageNet-21k at full size, without its pixels: real names, labels, orders, spec and commits.

`python -m support.full_size FOLDER` prints what each step of a build costs as JSON: seconds, and
the largest memory of the process's own (anonymous) in MB beyond that of the libraries. What it maps
from files is not counted: processes share it, and the system takes it back when memory is short.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import PIL.Image

from cache_service.datasets import ImageDataset
from cache_service.datasets.folder import FolderSource
from cache_service.datasets.path_list import PathList
from cache_service.format.commit import Commit, commit_key, encode_commit
from cache_service.format.layout import CacheLayout
from cache_service.format.shard import ChunkTable
from cache_service.loading import load_ahead
from cache_service.recording import context
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import BuildContext, open_build
from cache_service.recording.plan import make_plan
from cache_service.recording.record import Renderer, open_writer, record
from cache_service.recording.shards import Job
from cache_service.shared_arrays import GrowingArray
from cache_service.views.order import epoch_order

NUM_SAMPLES, NUM_CLASSES, NUM_SEEDS = 14_197_122, 21_841, 90
FIGURES: dict[str, dict[str, float]] = {}
BASE_MB = 0.0
"""What the imported libraries have, in this process and in a worker."""


class NamesOnly(FolderSource):
    """Images of a folder without the files: a grey square, whose shade is from the number."""

    def read(self, sample: int) -> PIL.Image.Image:
        return PIL.Image.new("RGB", (64, 64), (sample % 251,) * 3)

    def encoded(self, sample: int) -> bytes:
        return b"%d" % sample


def own_mb(process: int | str = "self") -> float:
    """Anonymous memory of a process in MB."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000


@contextmanager
def measured(step: str) -> Iterator[None]:
    """Note time and largest memory of a step, looked at every 10 ms."""
    done, largest = threading.Event(), [own_mb()]

    def watch() -> None:
        while not done.wait(0.01):
            largest[0] = max(largest[0], own_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    own = max(largest[0], own_mb()) - BASE_MB
    FIGURES[step] = {"seconds": round(seconds, 1), "own_mb": round(own)}


def names(num_samples: int, num_classes: int) -> ImageDataset:
    """Open the dataset as `open_folder` does, with names in place of a walk."""
    counts = np.diff(np.arange(num_classes + 1) * num_samples // num_classes).tolist()
    classes = [f"n{number + 1_440_764:08d}" for number in range(num_classes)]
    labels = GrowingArray(np.int64)

    def paths() -> Iterator[str]:
        for label, (name, count) in enumerate(zip(classes, counts, strict=True)):
            labels.append(np.full(count, label))
            yield from sorted(f"{name}/{name}_{number}.JPEG" for number in range(count))

    source = NamesOnly(Path("/nowhere"), PathList(paths()), labels.finish(), classes)
    return ImageDataset(source, name="folder", split="train")


class MeasuredRenderer(Renderer):
    """Renders in a worker, and returns what the worker has of its own."""

    def __call__(self, job: Job) -> dict[str, float]:  # type: ignore[override]
        super().__call__(job)
        return {"own_mb": round(own_mb())}


def write_commits(build: BuildContext, num_seeds: int) -> int:
    """Commits of every shard, as a build would leave them; those of a seed are one file."""
    layout = CacheLayout(build.spec)
    open_writer(build)
    table = ChunkTable(
        1 << 20,
        1 << 31,
        np.full(layout.num_chunks, 1 << 19, np.int64),
        np.full(layout.num_chunks, 1 << 31, np.uint32),
    )
    tables = dict.fromkeys((*layout.names, "witness"), table)
    root = Path(build.config.cache)
    for seed in range(num_seeds):
        content = encode_commit(Commit(build.spec.fingerprint, seed, 0, tables, {}))
        first = root / commit_key(seed, 0)
        first.parent.mkdir(parents=True, exist_ok=True)
        first.write_bytes(content)
        for shard in range(1, build.spec.num_shards):
            os.link(first, root / commit_key(seed, shard))
    return num_seeds * build.spec.num_shards


def main(folder: str, num_samples: int, num_classes: int, num_seeds: int) -> None:
    """Measure every step."""
    global BASE_MB
    BASE_MB = own_mb()
    with measured("open the dataset"):
        dataset = names(num_samples, num_classes)
    with measured("an order that nobody has computed"):
        epoch_order(num_samples, 0)
    context.open_dataset = lambda _: dataset  # type: ignore[assignment]
    config = BuildConfig.model_validate(
        {
            "cache": f"{folder}/cache",
            "dataset": {"name": "folder", "root": folder},
            "augment": {"preset": "imagenet", "size": 64},
            "seeds": f"0:{num_seeds}",
            "teacher": {"model": "support.toys:tiny_net", "allow_untrained": True},
            "codec": {"kind": "topk", "k": 10},
            "layout": {"shard_rows": 16384, "chunk_rows": 4096},
            "batch_size": 64,
            "workers": 0,
            "device": "cpu",
        }
    )
    with measured("open the build"):
        build = open_build(config)
    with measured("plan a new cache"):
        plan = make_plan(build)
    worker = MeasuredRenderer(build.views)
    job = Job(0, 0, 0, 64)
    with measured("start a loader worker, which renders a batch"):
        (of_worker,) = load_ahead(worker, [job], workers=1)
    FIGURES["in the loader worker"] = {"own_mb": round(of_worker["own_mb"] - BASE_MB)}
    shards = write_commits(build, num_seeds)
    assert shards == plan.shards
    with measured("start a builder with nothing left to do"):
        assert record(build, open_writer(build), seeds=config.seeds) == 0
    with measured("plan a complete cache"):
        assert make_plan(build).rows_pending == 0
    sys.stdout.write(json.dumps({"shards": shards, "rows": plan.rows, "figures": FIGURES}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:] or (NUM_SAMPLES, NUM_CLASSES, NUM_SEEDS)))
