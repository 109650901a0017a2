"""How much memory a reader takes: `python -m support.scan URL URL` reads both to the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import psutil

from cache_service.format.spec import CacheSpec
from cache_service.rows import shard_reader
from cache_service.rows.reader import open_cache
from cache_service.rows.shard_reader import DecodedChunks
from cache_service.storage.local import LocalStorage
from support.storages import FetchingStorage

STEP = 256

DECODED_BYTES = 4 << 20
"""Bound on decoded chunks here, below the size of the caches."""


def memory_of_scans(urls: list[str], *, mapped: bool) -> list[int]:
    """Peak resident bytes of one fresh process while it scans each cache in turn."""
    how = "mapped" if mapped else "fetched"
    command = [sys.executable, "-m", "support.scan", how, *urls]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    peaks: list[int] = json.loads(done.stdout)
    return peaks


def scan(url: str, storage: LocalStorage) -> int:
    """Read every row in order, then again by sample, and say the largest resident size seen."""
    cache = open_cache(url)
    cache.storage = storage
    spec: CacheSpec = cache.spec
    process, peak = psutil.Process(os.getpid()), 0
    for start in range(0, spec.dataset.num_samples, STEP):
        cache.read(0, start, min(start + STEP, spec.dataset.num_samples))
        peak = max(peak, process.memory_info().rss)
    return peak


def main() -> None:
    """Answer `memory_of_scans`."""
    how, *urls = sys.argv[1:]
    kind = LocalStorage if how == "mapped" else FetchingStorage
    shard_reader.DECODED = DecodedChunks(DECODED_BYTES)
    sys.stdout.write(json.dumps([scan(url, kind(url)) for url in urls]))


if __name__ == "__main__":
    main()
