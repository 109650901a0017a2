"""A cache's metadata documents and constant arrays, held against its root document."""

from __future__ import annotations

import json
import math

import numpy as np

from cache_service.errors import CorruptError
from cache_service.format.canonical import canonical_json
from cache_service.format.codecs import Head
from cache_service.format.commit import commit_key
from cache_service.format.group import Group
from cache_service.format.layout import array_documents, head_arrays, head_key
from cache_service.format.shard import decode_chunk
from cache_service.storage import Storage


def read_head(storage: Storage, group: Group) -> Head | None:
    """The linear head of a `features` cache, else None. Raises CorruptError where it is damaged."""
    shapes = head_arrays(group.spec)
    if not shapes:
        return None
    parts = {}
    for name, shape in shapes.items():
        key = head_key(name, shape)
        payload = decode_chunk(
            storage.get(key) or b"",
            checksum=group.head_crc32c[name],
            compression="none",
            num_bytes=4 * math.prod(shape),
            what=f"{storage.url}/{key}",
        )
        parts[name] = np.frombuffer(payload, "<f4").reshape(shape).astype(np.float32)
    return Head(parts["head_weight"], parts["head_bias"])


def check_array_documents(storage: Storage, group: Group) -> None:
    """Raise CorruptError where the document of an array is missing or is not the cache's."""
    for name in array_documents(group.spec, 1):
        key = f"{name}/zarr.json"
        content = storage.get(key) or b"{}"
        try:
            num_seeds = int(json.loads(content)["shape"][0])
            wanted = canonical_json(array_documents(group.spec, num_seeds)[name])
        except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
            wanted = b""
        if content != wanted:
            raise CorruptError(
                f"{storage.url}/{key} is missing or does not describe this cache.",
                hint="Run the same `kd-cache build` again: it writes the metadata anew.",
            )


def list_commits(storage: Storage, num_shards: int) -> dict[int, list[int]]:
    """Recorded shards by seed, both ascending, as the storage has them now."""
    found: dict[int, list[int]] = {}
    for key in storage.list("commits/"):
        seed, _, shard = key.removeprefix("commits/").removesuffix(".json").partition("/")
        # Nothing counts that is no commit's key: 0/00.json, or a shard past the last.
        if not (seed.isdecimal() and shard.isdecimal()):
            continue
        if commit_key(int(seed), int(shard)) == key and int(shard) < num_shards:
            found.setdefault(int(seed), []).append(int(shard))
    return {seed: sorted(found[seed]) for seed in sorted(found)}
