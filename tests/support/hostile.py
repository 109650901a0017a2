"""A cache made to harm its reader: every checksum fits, because its maker worked them out."""

from __future__ import annotations

import json
import multiprocessing
import resource
import tracemalloc
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cache_service.errors import KdCacheError
from cache_service.format.canonical import canonical_json, crc32c
from cache_service.format.shard import with_crc
from cache_service.rows.reader import open_cache

TIMEOUT_S = 60.0


def reseal_root(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the facts of the root document, and seal them again."""
    document = json.loads((root / "zarr.json").read_bytes())
    facts = document["attributes"]["kd_cache"]
    change(facts)
    del facts["crc32c"]
    facts["crc32c"] = crc32c(canonical_json(facts))
    (root / "zarr.json").write_bytes(canonical_json(document))


def reseal_commit(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the commit of seed 0, shard 0, and seal it again."""
    path = root / "commits/0/0.json"
    document = json.loads(path.read_bytes())
    change(document)
    del document["crc32c"]
    path.write_bytes(canonical_json(document | {"crc32c": crc32c(canonical_json(document))}))


def plant_witness(root: Path, frame: bytes) -> None:
    """Put a frame in the place of the witnesses of seed 0, shard 0, and commit to it."""
    (root / "witness/c/0/0/0/0/0/0").write_bytes(with_crc(frame))

    def commit(document: dict[str, Any]) -> None:
        document["objects"]["witness"] |= {
            "size": len(frame) + 4,
            "chunk_sizes": [len(frame)],
            "chunk_crc32c": [crc32c(frame)],
        }

    reseal_commit(root, commit)


def plant_chunk(root: Path, key: str, frame: bytes) -> None:
    """Put a frame in the place of the only chunk of a shard object, and commit to it."""
    stored = len(frame) + 4
    index = (0).to_bytes(8, "little") + stored.to_bytes(8, "little")
    (root / key).write_bytes(with_crc(frame) + with_crc(index))

    def commit(document: dict[str, Any]) -> None:
        document["objects"][key.split("/", maxsplit=1)[0]] |= {
            "size": stored + 20,
            "index_crc32c": crc32c(index),
            "chunk_sizes": [len(frame)],
            "chunk_crc32c": [crc32c(frame)],
        }

    reseal_commit(root, commit)


def bomb(num_bytes: int, *, declared: int | None) -> bytes:
    """A zstd frame of zeros: 4 bytes for each 128 KiB. Source: RFC 8878, 3.1.1."""
    block = 128 << 10
    count = num_bytes // block
    if declared is None:  # a window of 128 KiB, no content size
        header = bytes([0, 0x38])
    else:  # content size in 8 bytes, window as above
        header = bytes([0b1100_0000, 0x38]) + declared.to_bytes(8, "little")
    more = ((block << 3) | 0b010).to_bytes(3, "little") + b"\0"
    last = ((block << 3) | 0b011).to_bytes(3, "little") + b"\0"
    return b"\x28\xb5\x2f\xfd" + header + more * (count - 1) + last


def read_in_a_process(root: Path) -> tuple[str, int]:
    """What reading seed 0, shard 0 says, and by how many bytes the reader's peak memory grew."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_read_and_say, args=(theirs, root))
    process.start()
    theirs.close()
    try:
        assert ours.poll(TIMEOUT_S), "the reader hangs"
        said: tuple[str, int] = ours.recv()
    finally:
        process.kill()
        process.join()
    return said


def read_here(root: Path) -> tuple[str, int]:
    """The same in this process, as far as Python and NumPy take the memory."""
    tracemalloc.start()
    try:
        return _read(root), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _read_and_say(said: Connection, root: Path) -> None:
    before = _peak()
    said.send((_read(root), _peak() - before))


def _read(root: Path) -> str:
    try:
        cache = open_cache(str(root))
        cache.read(0, 0, cache.spec.shard_range(0)[1])
        cache.witnesses(0, 0)
        cache.lookup(0, cache.read(0, 0, 1)["sample"].astype("int64"))
    except KdCacheError as refusal:
        return f"{refusal.code}: {refusal}"
    return "whole"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
