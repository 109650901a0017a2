"""Writes whole shards: data first, each object durable, the commit last and create-only.

A writer that is killed between two writes leaves objects that no commit names: they are not read,
and the next builder replaces them with the same bytes.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import SpecMismatchError
from cache_service.format.canonical import crc32c
from cache_service.format.codecs import Arrays, Head
from cache_service.format.commit import Commit, commit_key, encode_commit
from cache_service.format.group import ROOT_KEY, Group, decode_group, encode_group
from cache_service.format.layout import CacheLayout, described_seeds
from cache_service.format.shard import CRC_BYTES, encode_packed_chunk, encode_shard, with_crc
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
            witnesses: the views at the layout's `witness_positions`, uint8 [W, H, W, 3].
            versions: of the libraries that rendered the views.

        Returns:
            Whether this call committed it; False where another builder was first.

        Raises:
            OutOfSpaceError: nothing is committed, and what was committed before stays good.
        """
        if self.is_committed(seed, shard):
            return False  # its objects must stay the ones that the commit names
        start, stop = self.spec.shard_range(shard)
        groups, compression = self.spec.layout, self.spec.codec.compression
        keys = self.group.layout.object_keys(seed, shard)
        tables = {}
        for array in self.group.layout.arrays:
            values = rows[array.name]
            assert values.dtype == array.dtype, (array.name, values.dtype)
            assert values.shape == (stop - start, *array.row_shape), (array.name, values.shape)
            body, tables[array.name] = encode_shard(
                values,
                shard_rows=groups.shard_rows,
                chunk_rows=groups.chunk_rows,
                fill=array.fill,
                compression=compression,
            )
            self.storage.put(keys[array.name], body)
        body, tables["witness"] = encode_packed_chunk(witnesses.tobytes())
        self.storage.put(keys["witness"], body)
        commit = Commit(self.group.fingerprint, seed, shard, tables, versions)
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
        provenance: how to open dataset and teacher again; replaces that of an earlier build.
        head: weight and bias, for the `features` codec.

    Raises:
        SpecMismatchError: another cache is there. Names the first differing field, both values.
        NotACacheError, CorruptError: something else is there, or a damaged cache.
    """
    layout = CacheLayout(spec)
    layout.check_size()
    heads = _head_chunks(layout, head)
    # Of the values, not of the stored chunk: a CRC over bytes and their own CRC is a constant.
    checksums = {name: crc32c(chunk[:-CRC_BYTES]) for name, chunk in heads.items()}
    keys = layout.head_keys()
    content = storage.get(ROOT_KEY)
    if content is None:
        for name, chunk in heads.items():
            storage.put(keys[name], chunk)
        _write_documents(storage, layout, num_seeds)
        # Last, because its presence means that everything beside it is there.
        storage.create(ROOT_KEY, encode_group(Group(spec, versions, provenance, checksums)))
        content = storage.get(ROOT_KEY) or b""
    group = decode_group(content, storage.url)
    refuse_other_spec(storage.url, requested=spec, recorded=group.spec)
    for name, chunk in heads.items():
        # A head that is not the sealed one belongs to nobody: it must not replace what is there.
        if checksums[name] == group.head_crc32c[name] and storage.get(keys[name]) != chunk:
            storage.put(keys[name], chunk)
    if group.provenance != provenance:
        # The same dataset and teacher, opened from another place. Other builders may do the same.
        group = dataclasses.replace(group, provenance=provenance)
        storage.put(ROOT_KEY, encode_group(group))
    _write_documents(storage, layout, num_seeds)
    return CacheWriter(storage, group)


def refuse_other_spec(url: str, *, requested: CacheSpec, recorded: CacheSpec) -> None:
    """Raise SpecMismatchError naming the first field in which two specs differ, if one does."""
    difference = first_difference(
        requested.model_dump(mode="json"), recorded.model_dump(mode="json")
    )
    if difference is None:
        return
    field, now, before = difference
    raise SpecMismatchError(
        f"the cache at {url} was recorded with {field} = {json.dumps(before)}, but this build has "
        f"{field} = {json.dumps(now)}: its rows belong to another teacher, dataset or recipe.",
        hint="Give the build another `cache:` path, or change the setting back.",
    )


def first_difference(requested: Any, recorded: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Dotted path and both values of the first leaf in which two JSON documents differ."""
    if isinstance(requested, dict) and isinstance(recorded, dict):
        for name in sorted(requested.keys() | recorded.keys()):
            below = f"{path}.{name}" if path else name
            difference = first_difference(requested.get(name), recorded.get(name), below)
            if difference is not None:
                return difference
        return None
    return None if requested == recorded else (path, requested, recorded)


def _head_chunks(layout: CacheLayout, head: Head | None) -> dict[str, bytes]:
    """The stored chunk of each constant array, by name."""
    if head is None:
        assert not layout.heads
        return {}
    values = {"head_weight": head.weight_CD, "head_bias": head.bias_C}
    return {name: with_crc(values[name].astype("<f4").tobytes()) for name in layout.heads}


def _write_documents(storage: Storage, layout: CacheLayout, num_seeds: int) -> None:
    """Write the metadata below the root where it is missing, damaged, or holds too few seeds."""
    contents = {key: storage.get(key) for key in layout.documents(1)}
    present = [described_seeds(contents[key]) for key in layout.seed_axis_keys()]
    for key, document in layout.documents(max(num_seeds, *present)).items():
        if contents[key] != document:
            storage.put(key, document)
