"""Build queues for tests: small configurations, requests, and workers that load no torch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_service.api.builds.request import BuildRequest
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.settings import BuildsConfig
from cache_service.recording.pool import COMMAND

PATIENCE_S = 30.0

SCRIPTED = """
import json, os, signal, sys, time
job = json.loads(sys.stdin.readline())
folder = {folder!r}

def say(**news):
    print(json.dumps(news), flush=True)

def progress(committed):
    return dict(rows_done=committed, rows_total=9, shards_done=committed, shards_total=9,
                shards_committed=committed, bytes_written=0, rows_per_s=1.0, eta_s=4.0)

def life():
    with open(os.path.join(folder, "lives"), "a") as file:
        print(os.getpid(), file=file)
    with open(os.path.join(folder, "lives")) as file:
        return len(file.readlines())

{script}
"""
"""A worker that reads its job as the real one does, and then does what the script says."""


def scripted(folder: Path, script: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", SCRIPTED.format(folder=str(folder), script=script))


def builds_document(**changes: Any) -> dict[str, Any]:
    """`builds:` with the toys."""
    document: dict[str, Any] = {
        "teachers": {
            "tiny": {"model": "support.toys:tiny_net", "allow_untrained": True},
            "wide": {
                "model": "support.toys:tiny_net",
                "allow_untrained": True,
                "model_args": {"width": 16},
            },
            "lost": {"model": "support.toys:tiny_net", "checkpoint": "/secret/place/of.pt"},
        },
        "datasets": {"patches": {"name": "support.toys:patches", "args": {"num_samples": 96}}},
        "devices": ["cpu"],
        "batch_size": 16,
        "workers": 0,
    }
    return document | changes


def request_document(**changes: Any) -> dict[str, Any]:
    """A request for the toys: 3 shards a seed."""
    document: dict[str, Any] = {
        "teacher": "tiny",
        "dataset": "patches",
        "cache": "toy",
        "augment": {"preset": "cifar", "size": 16},
        "seeds": "0:2",
        "scales": [1, 2],
        "layout": {"shard_rows": 32, "chunk_rows": 8},
    }
    return document | changes


def wanted(**changes: Any) -> BuildRequest:
    return BuildRequest.model_validate(request_document(**changes))


@contextmanager
def running_builds(
    root: Path, command: tuple[str, ...] = COMMAND, **changes: Any
) -> Iterator[Builds]:
    config = BuildsConfig.model_validate(builds_document(**changes))
    builds = Builds(str(root), config, command=command)
    builds.start()
    try:
        yield builds
    finally:
        builds.stop()


def until(true: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Wait for something to become true, and return it."""
    end = time.monotonic() + patience_s
    while not (found := true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return found


def until_final(builds: Builds, build_id: str, patience_s: float = PATIENCE_S) -> Any:
    return until(lambda: (b := builds.queue.get(build_id)).is_final and b, patience_s)
