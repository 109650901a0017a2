"""A throw-away cache of known size for measurements: random answers, no teacher, no torch."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.format.layout import CacheLayout, default_layout
from cache_service.format.recipe import AugmentConfig
from cache_service.format.spec import CacheSpec, DatasetId, Layout, Preprocess, TeacherId
from cache_service.rows.writer import create_cache
from cache_service.storage import open_storage

NUM_CLASSES = 1000
VIEW_SIZE = 8


def bench_spec(num_samples: int) -> CacheSpec:
    """ImageNet's thousand classes, one cell a view, float16: about 2 kB a row."""
    preprocess = Preprocess(size=VIEW_SIZE, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    draft = CacheSpec.model_validate(
        {
            "dataset": DatasetId(
                name="bench",
                split="train",
                num_samples=num_samples,
                num_classes=NUM_CLASSES,
                sha256="0" * 64,
            ),
            "recipe": AugmentConfig(size=VIEW_SIZE, preset="none").recipe(),
            "teacher": TeacherId(
                model="bench",
                weights_sha256="0" * 64,
                num_classes=NUM_CLASSES,
                preprocess=preprocess,
                map_side=1,
                affine_head=True,
            ),
            "scales": (1,),
            "stored_scales": (1,),
            "codec": {"kind": "dense"},
            "layout": Layout(shard_rows=2, chunk_rows=2),
        }
    )
    layout = default_layout(CacheLayout(draft).row_bytes, num_samples)  # what a build would take
    return draft.model_copy(update={"layout": layout})


def write_bench_cache(url: str, num_samples: int) -> CacheSpec:
    """One recorded seed of so many rows."""
    spec = bench_spec(num_samples)
    writer = create_cache(open_storage(url), spec, num_seeds=1, versions={}, provenance={})
    rng = np.random.default_rng(0)
    order = rng.permutation(num_samples).astype(np.int32)
    views = np.zeros(CacheLayout(spec).witness_shape, np.uint8)
    for shard in range(spec.num_shards):
        start, stop = spec.shard_range(shard)
        writer.write_shard(0, shard, _rows(spec, order[start:stop], rng), views, {})
    return spec


def _rows(
    spec: CacheSpec, samples: NDArray[np.int32], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    answers = rng.standard_normal((len(samples), 1, NUM_CLASSES), np.float32)
    labels = np.zeros((len(samples), 1), np.int64)
    words = rng.integers(0, 2**63, (2, len(samples)), dtype=np.uint64)
    encoded = spec.codec.encode(answers, labels)
    return {"sample": samples, "digest": words[0], "origin": words[1], **encoded}
