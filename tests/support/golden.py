"""The golden caches of `tests/golden/v1`: small, committed, and readable for as long as we live.

`python -m support.golden` (in `tests/`) writes them anew. Do that only while the format of a
version is not released: afterwards a change here is a change that orphans people's caches.

Every number comes from sha256, so it depends on no library's generator.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import open_cache
from cache_service.rows.writer import create_cache
from cache_service.storage import open_storage
from support.caches import VERSIONS, make_spec

FOLDER = Path(__file__).parents[1] / "golden" / "v1"
KNOWN = FOLDER / "known.json"
SEEDS = (0, 1)
LOOKED_AT = [0, 7, 8, 19]
"""Positions whose numbers are written out in `known.json`: both ends, and an edge of shards."""

CODECS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "topk": {"kind": "topk", "k": 3, "compression": "zstd"},
}


def golden_spec(name: str) -> CacheSpec:
    """20 samples of 6 classes in 3 shards a seed, 5 cells."""
    return make_spec(
        num_samples=20,
        num_classes=6,
        scales=(1, 2),
        map_side=7,
        codec=CODECS[name],
        shard_rows=8,
        chunk_rows=4,
    )


def write(name: str, root: Path) -> None:
    """Write one golden cache into an empty folder."""
    spec = golden_spec(name)
    writer = create_cache(
        open_storage(str(root)),
        spec,
        num_seeds=len(SEEDS),
        versions=VERSIONS,
        provenance={"dataset": {"name": "golden"}},
    )
    for seed in SEEDS:
        rows = golden_rows(spec, seed)
        for shard in range(spec.num_shards):
            start, stop = spec.shard_range(shard)
            part = {key: values[start:stop] for key, values in rows.items()}
            writer.write_shard(seed, shard, part, golden_witnesses(spec, seed, shard), VERSIONS)
    writer.storage.sweep()


def golden_rows(spec: CacheSpec, seed: int) -> dict[str, NDArray[Any]]:
    """Every row array of one seed, in position order."""
    count = spec.dataset.num_samples
    order = np.argsort(_noise(f"order {seed}", 8 * count).view("<u8"), kind="stable")
    shape = (count, spec.num_stored_cells, spec.teacher.num_classes)
    # Multiples of 1/512 in [-64, 64): exact in float32, rounded in float16.
    words = _noise(f"logits {seed}", 2 * int(np.prod(shape))).view("<u2").reshape(shape)
    answers = (words.astype(np.float32) - 32768) / np.float32(512)
    labels = (order % spec.teacher.num_classes).astype(np.int64)
    return {
        "sample": order.astype(np.int32),
        "digest": _noise(f"digest {seed}", 8 * count).view("<u8").astype(np.uint64),
        "origin": _noise(f"origin {seed}", 8 * count).view("<u8").astype(np.uint64),
        **spec.codec.encode(answers, labels[:, None]),
    }


def golden_witnesses(spec: CacheSpec, seed: int, shard: int) -> NDArray[np.uint8]:
    """Pixels of the views kept of one shard."""
    shape = CacheLayout(spec).witness_shape
    assert len(CacheLayout(spec).witness_positions(shard)) == shape[0]
    return _noise(f"views {seed} {shard}", int(np.prod(shape))).reshape(shape)


def known_values(name: str, root: Path) -> dict[str, Any]:
    """What a reader finds in a golden cache, in numbers that a person can check."""
    cache = open_cache(str(root))
    found: dict[str, Any] = {"fingerprint": cache.fingerprint}
    for seed in SEEDS:
        rows = cache.read(seed, 0, cache.spec.dataset.num_samples)
        logits_BRC = cache.spec.decode(rows, temperature=2.0, head=None)
        found[str(seed)] = {
            "sample": rows["sample"].tolist(),
            "digest": [f"{int(word):016x}" for word in rows["digest"][LOOKED_AT]],
            "origin": [f"{int(word):016x}" for word in rows["origin"][LOOKED_AT]],
            "logits of cells 0 and 4 at T=2": logits_BRC[LOOKED_AT][:, [0, 4]].tolist(),
            "first witness pixel of each shard": [
                cache.witnesses(seed, shard)[0, 0, 0].tolist()
                for shard in range(cache.spec.num_shards)
            ],
        }
    return found


def _noise(name: str, num_bytes: int) -> NDArray[np.uint8]:
    blocks = range(-(-num_bytes // 32))
    stream = b"".join(hashlib.sha256(f"{name} {block}".encode()).digest() for block in blocks)
    return np.frombuffer(stream[:num_bytes], np.uint8)


def main() -> None:
    """Write the golden caches and their known values anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name in CODECS:
        write(name, FOLDER / name)
    known = {name: known_values(name, FOLDER / name) for name in CODECS}
    text = json.dumps(known, indent=1)
    # One line for each innermost list, so that a person can compare the numbers.
    KNOWN.write_text(re.sub(r"\[[^][]+\]", lambda each: " ".join(each[0].split()), text) + "\n")


if __name__ == "__main__":
    main()
