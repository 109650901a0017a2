"""Small caches for tests, made without torch: known rows in, one folder out."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.format.cells import choose_stored_scales, num_cells
from cache_service.format.codecs import Head
from cache_service.format.layout import CacheLayout
from cache_service.format.recipe import AugmentConfig
from cache_service.format.spec import CacheSpec, DatasetId, Layout, Preprocess, TeacherId
from cache_service.rows.writer import CacheWriter, create_cache
from cache_service.storage import Storage, open_storage

VERSIONS = {"pillow": "13.0.0", "torchvision": "0.29.1"}


def make_spec(
    *,
    num_samples: int = 100,
    num_classes: int = 10,
    scales: tuple[int, ...] = (1, 2, 4),
    map_side: int = 8,
    affine_head: bool = True,
    codec: dict[str, Any] | None = None,
    shard_rows: int = 32,
    chunk_rows: int = 8,
    size: int = 8,
    weights: str = "a" * 64,
) -> CacheSpec:
    codec = codec or {"kind": "dense"}
    stored = choose_stored_scales(scales, map_side=map_side, affine_head=affine_head, chained=False)
    return CacheSpec.model_validate(
        {
            "dataset": DatasetId(
                name="toy",
                split="train",
                num_samples=num_samples,
                num_classes=num_classes,
                sha256="d" * 64,
            ),
            "recipe": AugmentConfig(size=size, preset="none").recipe(),
            "teacher": TeacherId(
                model="toy",
                weights_sha256=weights,
                num_classes=num_classes,
                preprocess=Preprocess(size=size, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)),
                map_side=map_side,
                affine_head=affine_head,
            ),
            "scales": scales,
            "stored_scales": scales if codec["kind"] == "topk" else stored,
            "codec": codec,
            "layout": Layout(shard_rows=shard_rows, chunk_rows=chunk_rows),
        }
    )


def answers(spec: CacheSpec, seed: int) -> NDArray[np.float32]:
    """Known float32 answers of one seed: logits, or features where the codec keeps those."""
    width = getattr(spec.codec, "num_channels", None) or spec.teacher.num_classes
    rng = np.random.default_rng(seed)
    shape = (spec.dataset.num_samples, num_cells(spec.stored_scales), width)
    return rng.normal(0, 3, shape).astype(np.float32)


def labels(spec: CacheSpec) -> NDArray[np.int64]:
    return np.arange(spec.dataset.num_samples, dtype=np.int64) % spec.teacher.num_classes


def make_rows(spec: CacheSpec, seed: int) -> dict[str, NDArray[Any]]:
    """Every row array of one whole seed, in position order."""
    rng = np.random.default_rng(1000 + seed)
    count = spec.dataset.num_samples
    order = rng.permutation(count).astype(np.int32)
    encoded = spec.codec.encode(answers(spec, seed), labels(spec)[order][:, None])
    words = rng.integers(0, 2**63, (2, count), dtype=np.uint64)
    return {"sample": order, "digest": words[0], "origin": words[1], **encoded}


def make_witnesses(spec: CacheSpec, seed: int, shard: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed * 1000 + shard)
    assert len(CacheLayout(spec).witness_positions(shard)) == CacheLayout(spec).witness_shape[0]
    return rng.integers(0, 256, CacheLayout(spec).witness_shape, dtype=np.uint8)


def make_head(spec: CacheSpec) -> Head | None:
    channels = getattr(spec.codec, "num_channels", None)
    if channels is None:
        return None
    rng = np.random.default_rng(5)
    weight = rng.normal(size=(spec.teacher.num_classes, channels)).astype(np.float32)
    return Head(weight, rng.normal(size=spec.teacher.num_classes).astype(np.float32))


def open_writer(where: str | Storage, spec: CacheSpec, num_seeds: int = 1) -> CacheWriter:
    return create_cache(
        open_storage(where) if isinstance(where, str) else where,
        spec,
        num_seeds=num_seeds,
        versions=VERSIONS,
        provenance={},
        head=make_head(spec),
    )


def write_shard(
    writer: CacheWriter,
    seed: int,
    shard: int,
    *,
    salt: int = 0,
    rows: dict[str, NDArray[Any]] | None = None,
) -> bool:
    """Write one shard of known rows: those of seed `seed + salt`, worked out where not given."""
    start, stop = writer.spec.shard_range(shard)
    every = make_rows(writer.spec, seed + salt) if rows is None else rows
    assert set(every) == {array.name for array in CacheLayout(writer.spec).arrays}
    part = {name: values[start:stop] for name, values in every.items()}
    views = make_witnesses(writer.spec, seed + salt, shard)
    return writer.write_shard(seed, shard, part, views, VERSIONS)


def write_cache(
    url: str, spec: CacheSpec, seeds: range = range(1), *, salt: int = 0
) -> CacheWriter:
    """A cache of known rows, complete for the given seeds."""
    writer = open_writer(url, spec, seeds.stop)
    for seed in seeds:
        rows = make_rows(spec, seed + salt)
        for shard in range(spec.num_shards):
            write_shard(writer, seed, shard, salt=salt, rows=rows)
    writer.storage.sweep()
    return writer
