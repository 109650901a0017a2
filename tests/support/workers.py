"""Reading in worker processes, from a parent that a test can watch: `python -m support.workers`.

A parent of its own, because what a fork does depends on what its parent did before.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from cache_service.errors import KdCacheError
from cache_service.format.canonical import crc32c
from cache_service.rows.reader import Cache, open_cache

TIMEOUT_S = 20.0
"""After which a worker counts as hung. Reading takes well under one."""

WORKERS = 2


def ask(method: str, url: str) -> dict[str, Any]:
    """What workers read that open the cache themselves (`lazy`), and that are handed one which
    the parent used (`used`), and what the parent still reads `after`."""
    command = [sys.executable, "-m", "support.workers", method, url]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=6 * TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def rows_digest(cache: Cache) -> str:
    """One word for all rows of both seeds, or the refusal.

    That is more than a cache keeps in memory, so a forked worker cannot live off its parent's.
    """
    try:
        found = [cache.read(seed, 0, cache.spec.dataset.num_samples) for seed in range(2)]
        found.append(cache.gather(0, np.array([3, 99, 40], np.int64)))
    except KdCacheError as refusal:
        return f"{refusal.code}: {refusal}"
    parts = [values.tobytes() for rows in found for values in rows.values()]
    return f"{crc32c(b''.join(parts)):08x}"


def _work(said: Connection, cache: Cache | str) -> None:
    said.send(rows_digest(open_cache(cache) if isinstance(cache, str) else cache))


def _workers(method: str, cache: Cache | str) -> list[str]:
    context: Any = multiprocessing.get_context(method)
    started = []
    for _ in range(WORKERS):
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=_work, args=(theirs, cache), daemon=True)
        worker.start()
        theirs.close()
        started.append((worker, ours))
    said = []
    for worker, ours in started:
        said.append(ours.recv() if ours.poll(TIMEOUT_S) else "hung")
        worker.kill()
    return said


def main() -> None:
    """Answer `ask`."""
    method, url = sys.argv[1:]
    answer: dict[str, Any] = {"lazy": _workers(method, url)}
    cache = open_cache(url)
    answer["parent"] = rows_digest(cache)
    answer["used"] = _workers(method, cache)
    answer["after"] = rows_digest(open_cache(url))
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
