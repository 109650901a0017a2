"""A cache on a server in worker processes, however they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.workers import ask

METHODS = ("fork", "spawn")


@pytest.mark.parametrize("method", METHODS)
def test_workers_read_what_their_parent_reads(origin, method):
    said = ask(method, origin.url("c"))
    assert len({*said["lazy"], *said["used"], said["parent"], said["after"]}) == 1
    assert ":" not in said["parent"]  # not a refusal


REMOTE = """
import json, os, sys
from cache_service.remote.source import open_source
cache = open_source(sys.argv[1])
before = cache.read(0, 0, 50)
cache.commits()
client = cache._objects.storage.client
idle = list(client._idle)
child = os.fork()
if child == 0 and client._take() in idle:
    os._exit(2)  # a connection of the parent
rows = cache.read(0, 50, 100)
ok = rows["sample"].shape == (50,) and cache.lookup(1, rows["sample"]) is not None
if child == 0:
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
json.dump([ok, status], sys.stdout)
"""


def test_a_fork_in_the_middle_of_a_sequence_harms_neither_side(origin):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REMOTE, origin.url("c")],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=os.environ,
    )
    assert (done.stderr, json.loads(done.stdout or "null")) == ("", [True, 0])
