"""The commit of a shard: the document whose existence means that the shard is recorded. No I/O.

It names every object of the shard with its size and checksums and is written last, create-only.
It binds them to the cache's fingerprint, the seed and the shard, so a commit (or an object) that
was copied from elsewhere is refused.
"""

from __future__ import annotations

import json
import operator
from typing import Any, NamedTuple

import numpy as np

from cache_service.errors import CorruptError
from cache_service.format.canonical import canonical_json, crc32c
from cache_service.format.shard import REPAIR, ChunkTable


class Commit(NamedTuple):
    """A parsed commit.

    Attributes:
        fingerprint: of the cache.
        seed: of the shard.
        shard: its number within the seed.
        objects: table of each stored object, by array name.
        versions: of the libraries that rendered the views, by library name.
    """

    fingerprint: str
    seed: int
    shard: int
    objects: dict[str, ChunkTable]
    versions: dict[str, str]


def commit_key(seed: int, shard: int) -> str:
    """Storage key of a shard's commit."""
    return f"commits/{seed}/{shard}.json"


def encode_commit(commit: Commit) -> bytes:
    """Canonical bytes: equal commits are equal objects."""
    document: dict[str, Any] = {
        "fingerprint": commit.fingerprint,
        "seed": commit.seed,
        "shard": commit.shard,
        "versions": commit.versions,
        "objects": {
            name: {
                "size": table.size,
                "index_crc32c": table.index_crc32c,
                "chunk_sizes": table.sizes.tolist(),
                "chunk_crc32c": table.checksums.tolist(),
            }
            for name, table in commit.objects.items()
        },
    }
    document["crc32c"] = crc32c(canonical_json(document))
    return canonical_json(document)


def decode_commit(
    content: bytes, *, fingerprint: str, seed: int, shard: int, names: tuple[str, ...]
) -> Commit:
    """Parse and check a commit.

    `fingerprint` is that of the cache, `seed` and `shard` are those of the key that it was read
    from. It must name the arrays `names`, no more and no fewer.

    Raises:
        CorruptError: damaged, or the commit of another cache, seed or shard.
    """
    what = f"commit {commit_key(seed, shard)}"
    try:
        document = json.loads(content)
        checksum = document.pop("crc32c")
        if canonical_json({**document, "crc32c": checksum}) != content:
            raise ValueError("not canonical")
        if crc32c(canonical_json(document)) != checksum:
            raise ValueError("checksum")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CorruptError(f"{what} is damaged.", hint=REPAIR) from problem
    for field, expected in (("fingerprint", fingerprint), ("seed", seed), ("shard", shard)):
        if document.get(field) != expected:
            raise CorruptError(
                f"{what} says {field}={document.get(field)!r}, but it lies where "
                f"{field}={expected!r} belongs: it was moved or copied here.",
                hint=REPAIR,
            )
    try:
        objects = {name: _table(entry) for name, entry in document["objects"].items()}
        versions = {str(name): str(version) for name, version in document["versions"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as problem:
        raise CorruptError(f"{what} is not of the form of a commit.", hint=REPAIR) from problem
    if set(objects) != set(names):
        raise CorruptError(f"{what} names other arrays than the cache has.", hint=REPAIR)
    return Commit(fingerprint, seed, shard, objects, versions)


def _table(entry: dict[str, Any]) -> ChunkTable:
    table = ChunkTable(
        size=operator.index(entry["size"]),
        index_crc32c=operator.index(entry["index_crc32c"]),
        sizes=np.array([operator.index(size) for size in entry["chunk_sizes"]], np.int64),
        checksums=np.array([operator.index(crc) for crc in entry["chunk_crc32c"]], np.uint32),
    )
    if table.sizes.shape != table.checksums.shape or not 0 <= table.index_crc32c < 2**32:
        raise ValueError("table")
    return table
