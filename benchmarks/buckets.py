"""Trains one student from a folder and from a bucket in turn: does the bucket keep it as busy?

    .venv/bin/python benchmarks/buckets.py [--latency-ms 2] [--rounds 3] [--samples 2000]
    .venv/bin/python benchmarks/buckets.py --read 32768    # rows a second, without a student

The bucket is moto's on this machine, or the server that KD_CACHE_S3_ENDPOINT names, behind a proxy
that delays every answer and counts. Each round trains the same epochs from both, the bucket with an
empty disk cache: epochs of seeds that are read for the first time are `first`, later passes
`steady`. The goal is 0.95 of the rate of the folder for both. Server and proxy share the machine's
cores. Times by the clock mean something on a quiet machine only; CPU times leave out the waits.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import pytest
from support import s3
from support.builds import record_toy
from support.caches import make_spec, write_cache
from support.counted import CountingProxy

from cache_service.config import validate_config
from cache_service.format.layout import CacheLayout
from cache_service.remote.source import DEFAULT_DISK, DiskSettings, open_source
from cache_service.storage import open_storage
from distill.config import TrainConfig
from distill.trainer import train

CLASSES = 100
SIDE = 32
SEEDS = 2
GOAL = 0.95
BATCH = 256


class Noise:
    """Images of noise: what they show does not matter for time."""

    classes = tuple(f"class {number}" for number in range(CLASSES))

    def __init__(self, num_samples: int) -> None:
        rng = np.random.default_rng(0)
        self._images = rng.integers(0, 256, (num_samples, SIDE, SIDE, 3), dtype=np.uint8)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """An image and its class."""
        return self._images[index], index % CLASSES


def _dataset(num_samples: int) -> dict[str, Any]:
    return {"name": f"{Path(__file__)}:Noise", "args": {"num_samples": num_samples}}


def _record(cache: str, num_samples: int) -> None:
    record_toy(
        cache,
        dataset=_dataset(num_samples),
        augment={"preset": "cifar", "size": SIDE},
        seeds=f"0:{SEEDS}",
        teacher={"model": "resnet8x4", "allow_untrained": True},
        scales=[1],
        layout={"shard_rows": 512, "chunk_rows": 256},
        batch_size=64,
    )


class Epochs(NamedTuple):
    """Seconds of each epoch of a run, by the clock and of this process's CPU."""

    wall_s: list[float]
    cpu_s: list[float]


def _run(cache: Any, out: Path, num_samples: int, workers: int) -> Epochs:
    """Train a student; every seed is read twice."""
    document = {
        "dataset": _dataset(num_samples),
        "caches": cache,
        "student": {"model": "resnet8x4"},
        "method": {"name": "kd"},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "epochs": 2 * SEEDS,
        "batch_size": 64,
        "workers": workers,
        "loader": "workers",
        "device": "cpu",
        "out": str(out),
    }
    epochs, ends = Epochs([], []), [0.0]

    def note(event: Any) -> None:
        if event.kind == "start":
            ends[0] = time.process_time()
        if event.kind == "epoch":
            epochs.wall_s.append(event.values["epoch_s"])
            ends.append(time.process_time())
            epochs.cpu_s.append(ends[-1] - ends[-2])

    train(validate_config(TrainConfig, document, where="benchmark"), on_event=note)
    return epochs


def measure(arguments: argparse.Namespace, folder: Path, proxy: CountingProxy) -> dict[str, Any]:
    """Rates of the bucket over those of the folder, by kind of epoch, and what was asked."""
    local, url = str(folder / "cache"), s3.new_prefix()
    _record(local, arguments.samples)
    bucket, source = open_storage(url), open_storage(local)
    for key in source.list(""):
        bucket.put(key, source.get(key) or b"")
    sizes, asked = (arguments.samples, arguments.workers), []
    ratios: dict[str, list[float]] = defaultdict(list)
    _run(local, folder / "warm", *sizes)
    for number in range(arguments.rounds):
        kept = {"url": url, "disk_cache": str(folder / f"disk{number}")}
        proxy.asked.clear()
        pairs = {}
        for name, cache in sorted({"bucket": kept, "folder": local}.items(), reverse=number % 2):
            pairs[name] = _run(cache, folder / f"{name}{number}", *sizes)
        asked.append((len(proxy.asked), proxy.num_bytes()))
        for clock in Epochs._fields:
            both = zip(*(getattr(pairs[name], clock) for name in ("folder", "bucket")), strict=True)
            rates = [one / other for one, other in both]
            ratios[f"first_{clock}"] += rates[:SEEDS]
            ratios[f"steady_{clock}"] += rates[SEEDS:]
        print(json.dumps({**pairs, "requests": asked[-1][0]}), file=sys.stderr, flush=True)
    rows = sum(source.size(key) or 0 for key in source.list("") if _is_row(key))
    return {
        "latency_ms": arguments.latency_ms,
        "goal": GOAL,
        **{name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "requests_a_run": statistics.median(count for count, _ in asked),
        "bytes_fetched_over_bytes_of_rows": round(max(size for _, size in asked) / rows, 3),
        "epochs_a_run": 2 * SEEDS,
        "rounds": arguments.rounds,
    }


def measure_reading(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rows a second of an epoch in order, 1000 logits each, from a folder and through copies."""
    local, url = str(folder / "cache"), s3.new_prefix()
    spec = make_spec(
        num_samples=arguments.read, num_classes=1000, scales=(1,), shard_rows=8192, chunk_rows=256
    )
    for place in (local, url):
        write_cache(place, spec)
    _read(local)
    rates: dict[str, list[float]] = defaultdict(list)
    for number in range(arguments.rounds):
        copies = DiskSettings(str(folder / f"read{number}"))
        rates["folder"].append(_read(local))
        rates["bucket_first"].append(_read(url, copies))
        rates["bucket_again"].append(_read(url, copies))
        print(json.dumps({name: rate[-1] for name, rate in rates.items()}), file=sys.stderr)
    return {
        "latency_ms": arguments.latency_ms,
        "rows": arguments.read,
        "row_bytes": CacheLayout(spec).row_bytes,
        **{f"{name}_rows_per_s": round(statistics.median(rate)) for name, rate in rates.items()},
        "rounds": arguments.rounds,
    }


def _read(url: str, disk: DiskSettings = DEFAULT_DISK) -> float:
    """Rows a second of one epoch of a newly opened cache."""
    began = time.perf_counter()
    cache = open_source(url, disk=disk)
    count = cache.spec.dataset.num_samples
    for start in range(0, count, BATCH):
        cache.read(0, start, min(start + BATCH, count))
    return count / (time.perf_counter() - began)


def _is_row(key: str) -> bool:
    return "/c/" in key and not key.startswith("witness")


def main() -> None:
    """Measure and print one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--latency-ms", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--read", type=int, metavar="ROWS", help="read only; trains no student")
    arguments = parser.parse_args()
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        for name, value in s3.moto_environment().items():
            patch.setenv(name, value)
        with s3.counted_bucket(patch) as proxy:
            proxy.latency_s = arguments.latency_ms / 1000
            if arguments.read:
                found = measure_reading(arguments, Path(folder))
            else:
                found = measure(arguments, Path(folder), proxy)
    found |= {"seconds": round(time.monotonic() - began), "load": os.getloadavg()[0]}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
