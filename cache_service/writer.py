"""Writing whole shards: data first, each object durable, the commit last and create-only.

Whoever is killed between two writes leaves objects that no commit names: they are not read, and the
next builder replaces them with the same bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import SpecMismatchError
from cache_service.format.canonical import canonical_json, crc32c
from cache_service.format.codecs import Arrays, Head
from cache_service.format.commit import Commit, commit_key, encode_commit
from cache_service.format.group import (
    COMMITS_DOCUMENT,
    COMMITS_KEY,
    ROOT_KEY,
    Group,
    decode_group,
    encode_group,
    make_group,
)
from cache_service.format.layout import (
    array_documents,
    head_arrays,
    head_key,
    object_key,
    refuse_oversize,
    row_arrays,
    witness_key,
)
from cache_service.format.shard import CRC_BYTES, ChunkTable, encode_shard, pack
from cache_service.format.spec import CacheSpec
from cache_service.storage import Storage


class CacheWriter:
    """One cache, opened for recording. Made by `create_cache`."""

    def __init__(self, storage: Storage, group: Group) -> None:
        self.storage = storage
        self.group = group
        self.spec: CacheSpec = group.spec

    def is_committed(self, seed: int, shard: int) -> bool:
        """Whether the shard is recorded."""
        return self.storage.size(commit_key(seed, shard)) is not None

    def write_shard(
        self,
        seed: int,
        shard: int,
        rows: Arrays,
        witnesses: NDArray[np.uint8],
        versions: dict[str, str],
    ) -> bool:
        """Write and commit one shard.

        Args:
            seed: the recorded epoch.
            shard: its number within the seed.
            rows: every row array of the cache, a row per position of the shard.
            witnesses: the views at `layout.witness_positions`, uint8 [W, H, W, 3].
            versions: of the libraries that rendered the views.

        Returns:
            Whether this call committed it; False where another builder was first.

        Raises:
            OutOfSpaceError: nothing is committed, and what was committed before stays good.
        """
        if self.is_committed(seed, shard):
            return False  # its objects must stay the ones that the commit names
        start, stop = self.spec.shard_range(shard)
        layout, compression = self.spec.layout, self.spec.codec.compression
        objects = {}
        for array in row_arrays(self.spec):
            values = rows[array.name]
            assert values.dtype == array.dtype, (array.name, values.dtype)
            assert values.shape == (stop - start, *array.row_shape), (array.name, values.shape)
            body, objects[array.name] = encode_shard(
                values,
                shard_rows=layout.shard_rows,
                chunk_rows=layout.chunk_rows,
                fill=array.fill,
                compression=compression,
            )
            self.storage.put(object_key(array, seed, shard), body)
        packed = pack(witnesses.tobytes())
        self.storage.put(witness_key(seed, shard), with_crc(packed))
        objects["witness"] = ChunkTable(
            size=len(packed) + CRC_BYTES,
            index_crc32c=0,
            sizes=np.array([len(packed)], np.int64),
            checksums=np.array([crc32c(packed)], np.uint32),
        )
        commit = Commit(self.group.fingerprint, seed, shard, objects, versions)
        return self.storage.create(commit_key(seed, shard), encode_commit(commit))


def create_cache(
    storage: Storage,
    spec: CacheSpec,
    *,
    num_seeds: int,
    versions: dict[str, str],
    provenance: dict[str, Any],
    head: Head | None = None,
) -> CacheWriter:
    """Open the cache of this spec for recording; make or extend it where needed.

    Args:
        storage: where.
        spec: identity.
        num_seeds: one more than the largest seed that will be recorded. Arrays only ever grow.
        versions: of the libraries that render its views.
        provenance: how to open dataset and teacher again.
        head: weight and bias, for the `features` codec.

    Raises:
        SpecMismatchError: another cache is there. Names the first differing field, both values.
        NotACacheError, CorruptError: something else is there, or a damaged cache.
    """
    refuse_oversize(spec)
    heads = _head_objects(spec, head)
    content = storage.get(ROOT_KEY)
    if content is None:
        # Of the values, not of the stored chunk: a CRC over bytes and their own CRC is a constant.
        checksums = {name: crc32c(body[:-CRC_BYTES]) for name, (_, body) in heads.items()}
        group = make_group(spec, versions=versions, provenance=provenance, head_crc32c=checksums)
        for key, body in heads.values():
            storage.put(key, body)
        _write_documents(storage, spec, num_seeds)
        # Last, because its presence says that everything beside it is there.
        storage.create(ROOT_KEY, encode_group(group))
        content = storage.get(ROOT_KEY) or b""
    group = decode_group(content, storage.url)
    refuse_other_spec(storage.url, wanted=spec, found=group.spec)
    for name, (key, body) in heads.items():
        sealed = crc32c(body[:-CRC_BYTES]) == group.head_crc32c[name]
        if sealed and storage.get(key) != body:
            storage.put(key, body)
    _write_documents(storage, spec, num_seeds)
    return CacheWriter(storage, group)


def refuse_other_spec(url: str, *, wanted: CacheSpec, found: CacheSpec) -> None:
    """Raise SpecMismatchError naming the first field in which two specs differ, if one does."""
    difference = first_difference(wanted.model_dump(mode="json"), found.model_dump(mode="json"))
    if difference is None:
        return
    field, want, have = difference
    raise SpecMismatchError(
        f"the cache at {url} was recorded with {field} = {json.dumps(have)}, but this build has "
        f"{field} = {json.dumps(want)}: its rows answer another question.",
        hint="Give the build another `cache:` path, or change the setting back.",
    )


def first_difference(wanted: Any, found: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Dotted path and both values of the first leaf in which two JSON documents differ."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for name in sorted(wanted.keys() | found.keys()):
            below = f"{path}.{name}" if path else name
            difference = first_difference(wanted.get(name), found.get(name), below)
            if difference is not None:
                return difference
        return None
    return None if wanted == found else (path, wanted, found)


def with_crc(payload: bytes) -> bytes:
    """A chunk as Zarr's `crc32c` codec stores it."""
    return payload + crc32c(payload).to_bytes(CRC_BYTES, "little")


def _head_objects(spec: CacheSpec, head: Head | None) -> dict[str, tuple[str, bytes]]:
    if head is None:
        assert not head_arrays(spec)
        return {}
    values = {"head_weight": head.weight_CD, "head_bias": head.bias_C}
    return {
        name: (head_key(name, shape), with_crc(values[name].astype("<f4").tobytes()))
        for name, shape in head_arrays(spec).items()
    }


def _write_documents(storage: Storage, spec: CacheSpec, num_seeds: int) -> None:
    """Write the metadata below the root where it is missing, damaged, or holds too few seeds."""
    if storage.get(COMMITS_KEY) != COMMITS_DOCUMENT:
        storage.put(COMMITS_KEY, COMMITS_DOCUMENT)
    constant = head_arrays(spec)
    contents = {name: storage.get(f"{name}/zarr.json") for name in array_documents(spec, 1)}
    present = [_num_seeds(content) for name, content in contents.items() if name not in constant]
    documents = array_documents(spec, max(num_seeds, *present))
    for name, document in documents.items():
        if contents[name] != canonical_json(document):
            storage.put(f"{name}/zarr.json", canonical_json(document))


def _num_seeds(document: bytes | None) -> int:
    """Length of the seed axis that an array's document describes; 0 where it is not readable."""
    try:
        return int(json.loads(document or b"{}")["shape"][0])
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return 0
