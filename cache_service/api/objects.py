"""Which keys a cache has, and what is known of the object behind one before it is sent."""

from __future__ import annotations

import json
import re
from typing import Literal, NamedTuple

from cache_service.api.catalog import Served
from cache_service.errors import CorruptError, NotACacheError, RowsNotBuiltError
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.group import COMMITS_DOCUMENT, COMMITS_KEY, ROOT_KEY, encode_group
from cache_service.format.layout import (
    array_documents,
    head_arrays,
    head_key,
    object_key,
    row_arrays,
    witness_key,
)
from cache_service.format.shard import REPAIR
from cache_service.format.spec import CacheSpec
from cache_service.reader import Cache
from cache_service.storage import Storage

_SHARD_OBJECT = re.compile(r"([a-z_]{1,32})/c/(0|[1-9]\d{0,9})/(0|[1-9]\d{0,9})(?:/0)*", re.ASCII)
_COMMIT = re.compile(r"commits/(0|[1-9]\d{0,9})/(0|[1-9]\d{0,9})\.json", re.ASCII)


class NoSuchKeyError(NotACacheError):
    """No cache of this kind has such a key."""

    code = "no_such_key"


class Found(NamedTuple):
    """An object that may be sent.

    Attributes:
        content: of a small one, checked; None where the bytes are to be read from `storage`.
        is_immutable: whether it may be kept for ever.
    """

    storage: Storage
    key: str
    size: int
    etag: str
    media_type: str
    is_immutable: bool
    content: bytes | None


class Place(NamedTuple):
    """A key that is a shard's: of one of its arrays, or its commit."""

    kind: Literal["object", "commit"]
    name: str
    seed: int
    shard: int


def shard_of_key(key: str) -> Place | None:
    """The shard that a key belongs to; None for metadata and for what is no key at all."""
    found = _SHARD_OBJECT.fullmatch(key)
    if found is not None:
        return Place("object", found[1], int(found[2]), int(found[3]))
    found = _COMMIT.fullmatch(key)
    return None if found is None else Place("commit", "", int(found[1]), int(found[2]))


def find(served: Served, key: str) -> Found:
    """The object behind a key.

    Raises:
        NoSuchKeyError: no cache with this spec has that key.
        RowsNotBuiltError: it is of a shard that is not recorded.
        CorruptError: it should be there, and is missing, of another size, or not what was written.
    """
    place = shard_of_key(key)
    if place is None or place.name in head_arrays(served.cache.spec):
        return _metadata(served, key)
    spec = served.cache.spec
    if place.shard >= spec.num_shards:
        raise _no_such_key(key)
    if place.kind == "commit":
        return _commit(served, key, place)
    if object_keys(spec, place.seed, place.shard).get(place.name) != key:
        raise _no_such_key(key)
    commit = served.cache.commit(place.seed, place.shard)
    table = commit.objects[place.name]
    storage = served.cache.storage
    served.refuse_links(key)
    size = storage.size(key)
    if size != table.size:
        raise CorruptError(
            f"{served.name}/{key} has {size or 0} bytes, but {table.size} were committed.",
            hint=REPAIR,
        )
    tag = [commit.fingerprint, key, size, table.index_crc32c, table.checksums.tolist()]
    return Found(
        storage, key, size, _etag(canonical_json(tag)), "application/octet-stream", True, None
    )


def object_keys(spec: CacheSpec, seed: int, shard: int) -> dict[str, str]:
    """Keys of a shard's objects by array name, the witnesses' among them."""
    keys = {array.name: object_key(array, seed, shard) for array in row_arrays(spec)}
    return keys | {"witness": witness_key(seed, shard)}


def _commit(served: Served, key: str, place: Place) -> Found:
    served.refuse_links(key)
    content = served.cache.storage.get(key)
    if content is None:
        raise MissingCommitError(
            f"shard {place.shard} of seed {place.seed} of {served.name} is not recorded."
        )
    served.cache.commit(place.seed, place.shard)
    return _small(served, key, content, is_immutable=False)


class MissingCommitError(NotACacheError):
    """A commit was asked for by its own key; that there is none is an answer, and no hole."""

    code = RowsNotBuiltError.code


def _metadata(served: Served, key: str) -> Found:
    cache = served.cache
    shapes = head_arrays(cache.spec)
    heads = {head_key(name, shape): name for name, shape in shapes.items()}
    if key in heads:
        served.refuse_links(key)
        cache.head()  # checks every one of them
        content = cache.storage.get(key) or b""
        return _small(served, key, content, is_immutable=True)
    if key not in documents_of(cache.spec):
        raise _no_such_key(key)
    served.refuse_links(key)
    content = cache.storage.get(key) or b""
    if not _is_as_written(cache, key, content):
        raise CorruptError(
            f"{served.name}/{key} is missing or does not describe this cache.",
            hint="Run the same `kd-cache build` again: it writes the metadata anew.",
        )
    return _small(served, key, content, is_immutable=False)


def documents_of(spec: CacheSpec) -> set[str]:
    """Keys of the metadata documents of a cache."""
    return {ROOT_KEY, COMMITS_KEY, *(f"{name}/zarr.json" for name in array_documents(spec, 1))}


def _is_as_written(cache: Cache, key: str, content: bytes) -> bool:
    if key == ROOT_KEY:
        return content == encode_group(cache.group)
    if key == COMMITS_KEY:
        return content == COMMITS_DOCUMENT
    try:
        # The seed axis of a row array; any number does for one that has none.
        num_seeds = int(json.loads(content)["shape"][0])
        wanted = array_documents(cache.spec, num_seeds)[key.removesuffix("/zarr.json")]
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        return False
    return content == canonical_json(wanted)


def _small(served: Served, key: str, content: bytes, *, is_immutable: bool) -> Found:
    kind = "application/json" if key.endswith(".json") else "application/octet-stream"
    return Found(
        served.cache.storage, key, len(content), _etag(content), kind, is_immutable, content
    )


def _etag(content: bytes) -> str:
    return f'"{sha256_hex(content)[:32]}"'


def _no_such_key(key: str) -> NoSuchKeyError:
    return NoSuchKeyError(f"no cache has a key {key[:200]!r}.")
