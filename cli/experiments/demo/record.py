"""The demo's recording, and one view of it to look at."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.format.cells import expand_cells
from cache_service.format.layout import CacheLayout
from cache_service.format.seeds import describe_seeds
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare, run_local
from cache_service.recording.shards import Progress
from cache_service.rows.reader import Cache, open_cache
from cache_service.storage.local import LocalStorage
from cache_service.views.replay import Views
from cli.experiments.demo.result import CellGrid, Recording, SampleView
from distill.losses import sdd_weights

SECONDS_NAME = "recording-seconds.txt"

NUM_LIKELIEST = 3
"""Classes of the whole image that the report lists."""


def record(out: str, document: dict[str, Any], say: Callable[[str], None]) -> Recording:
    """Record what is not recorded yet."""
    config = BuildConfig.model_validate(document)
    storage = LocalStorage(out)
    started = time.perf_counter()
    opened = open_build(config)
    prepare(opened, on_message=lambda line: say(f"  {line}"))

    told = 0

    def on_progress(progress: Progress) -> None:
        nonlocal told
        if progress.rows_done > told:
            told = progress.rows_done
            say(f"  {told:,} of {progress.rows_total:,} views recorded")

    committed = run_local(opened, seeds=config.seeds, on_progress=on_progress)
    seconds = float(storage.get(SECONDS_NAME) or 0)
    if committed:
        seconds += time.perf_counter() - started
        storage.put(SECONDS_NAME, f"{seconds}\n".encode())
        storage.sweep()
    else:
        say("  every view was recorded before.")
    return _facts(open_cache(config.cache), config.seeds, seconds or None)


def _facts(cache: Cache, seeds: tuple[int, ...], seconds: float | None) -> Recording:
    spec = cache.spec
    files = LocalStorage(cache.url)
    return Recording(
        url=cache.url,
        fingerprint=cache.fingerprint,
        views=len(seeds) * spec.dataset.num_samples,
        seeds=describe_seeds(seeds),
        scales=spec.scales,
        stored_scales=spec.stored_scales,
        bytes_per_view=CacheLayout(spec).row_bytes,
        stored_bytes=sum(files.size(key) or 0 for key in files.list("")),
        seconds=seconds,
    )


def look_at_one(url: str, dataset: DatasetConfig) -> SampleView:
    """The view of the first seed whose cells disagree most evenly with the whole image.

    Of the views that the teacher gets right as a whole, the first of those in which the
    complementary cells come closest to half: there is something of each kind to see.
    """
    cache = open_cache(url)
    images, spec = open_dataset(dataset), cache.spec
    seed = cache.complete_seeds()[0]
    rows = cache.read(seed, 0, spec.dataset.num_samples)
    stored_BSC = spec.decode(rows, head=cache.head())
    cells_BRC = expand_cells(stored_BSC, spec.scales, spec.stored_scales)
    labels_B = images.labels[rows["sample"]]
    weights_BR = sdd_weights(
        torch.from_numpy(cells_BRC), torch.from_numpy(labels_B), complementary_weight=2.0
    )
    complementary_BR = weights_BR.numpy() > 1
    uneven_B = np.abs(complementary_BR[:, 1:].mean(axis=1) - 0.5)
    uneven_B[cells_BRC[:, 0].argmax(axis=1) != labels_B] = np.inf
    position = int(uneven_B.argmin())
    view = Views(spec.recipe, images).render(seed, np.array([position], np.int64))
    assert view.digests_B[0] == rows["digest"][position], "training has replayed this view"
    label = int(labels_B[position])
    return SampleView(
        seed=seed,
        position=position,
        sample=int(rows["sample"][position]),
        label=label,
        classes=images.classes or tuple(map(str, range(spec.teacher.num_classes))),
        pixels_HW3=view.pixels_BHW3[0],
        likeliest=_likeliest(cells_BRC[position, 0]),
        grids=_grids(spec.scales, cells_BRC[position], complementary_BR[position], label),
    )


def _likeliest(logits_C: NDArray[np.float32]) -> tuple[tuple[int, float, float], ...]:
    shares_C = np.exp(logits_C - logits_C.max())
    shares_C /= shares_C.sum()
    best = np.argsort(-logits_C, kind="stable")[:NUM_LIKELIEST]
    return tuple((int(c), float(logits_C[c]), float(shares_C[c])) for c in best)


def _grids(
    scales: tuple[int, ...],
    cells_RC: NDArray[np.float32],
    complementary_R: NDArray[np.bool_],
    label: int,
) -> tuple[CellGrid, ...]:
    grids, first = [], 0
    for scale in scales:
        here = slice(first, first + scale * scale)
        grids.append(
            CellGrid(
                scale=scale,
                top=tuple(cells_RC[here].argmax(axis=1).tolist()),
                label_logit=tuple(cells_RC[here, label].tolist()),
                complementary=tuple(complementary_R[here].tolist()),
            )
        )
        first = here.stop
    return tuple(grids)
