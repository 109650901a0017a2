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


# Without retries a response that the other process took away would be an error.
REMOTE = """
import json, os, sys
from cache_service.remote.cache import open_remote
from cache_service.storage.retries import RetryPolicy
cache = open_remote(sys.argv[1], retries=RetryPolicy(first_s=0.0, total_s=0.0, attempts=1))
whole = cache.read(0, 0, 300)["sample"]
cache.commits()
child = os.fork()
try:
    for start in range(0, 300, 15):
        rows = cache.read(0, start, start + 15)["sample"]
        assert (rows == whole[start : start + 15]).all(), start
        assert (cache.lookup(1, rows)["sample"] == rows).all(), start
    ok = True
except BaseException as problem:
    print(repr(problem), file=sys.stderr)
    ok = False
if child == 0:
    sys.stderr.flush()
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
