"""How often the process of a recording worker is replaced: as long as it makes progress."""

from __future__ import annotations

import sys

import pytest
from support.builds import build_document

from cache_service import processes
from cache_service.errors import NonFiniteError, StorageError
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.pool import RecordingWorker
from cache_service.recording.shards import WHOLE

REPORTS = """
import json, os, signal, sys
job = json.loads(sys.stdin.readline())
with open({lives!r}, "a") as file:
    print("life", file=file)
life = len(open({lives!r}).readlines())

def report(done, committed=0):
    counts = dict(seed=0, shard=0, rows_done=0, rows_total=0, shards_done=done, shards_total=20,
                  shards_committed=committed, bytes_written=0, rows_per_s=1.0, eta_s=0.0)
    print(json.dumps(dict(progress=counts)), flush=True)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

{script}
"""


@pytest.fixture
def make(tmp_path):
    made = []

    def make(script):
        text = REPORTS.format(lives=str(tmp_path / "lives"), script=script)
        config = BuildConfig.model_validate(build_document(str(tmp_path / "c")))
        command = (sys.executable, "-S", "-c", text)
        made.append(RecordingWorker(config, (0,), WHOLE, command=command))
        return made[-1]

    yield make
    for worker in made:
        worker.stop()


def check_until_done(worker):
    while not worker.is_done:
        worker.check()


def num_lives(tmp_path):
    return len((tmp_path / "lives").read_text().split())


def test_a_worker_that_commits_no_shard_in_four_lives_is_given_up(make, tmp_path):
    with pytest.raises(StorageError, match=r"4 times without committing a shard \(signal 9\)"):
        check_until_done(make("report(3); die()"))
    assert num_lives(tmp_path) == processes.MAX_RESTARTS + 1


def test_commits_that_only_the_next_process_reports_keep_a_worker_going(make, tmp_path):
    with pytest.raises(StorageError, match="without committing a shard"):
        check_until_done(make("report(min(life - 1, 9)); die()"))
    assert num_lives(tmp_path) == 9 + processes.MAX_RESTARTS + 1


def test_a_worker_counts_the_commits_of_all_its_processes(make):
    worker = make(
        "report(life, committed=life)\nif life < 3: die()\nprint(json.dumps({'done': 1}))"
    )
    check_until_done(worker)
    assert worker.committed == 1 + 2 + 3


def test_the_refusal_of_a_worker_is_raised_as_its_own_error(make):
    refusal = NonFiniteError("the teacher's answer is NaN.", hint="Use float32.").as_document()
    with pytest.raises(NonFiniteError, match=r"the teacher's answer is NaN\. Use float32\.") as got:
        check_until_done(make(f"print(json.dumps(dict(error={refusal!r})))"))
    assert got.value.hint == "Use float32."
