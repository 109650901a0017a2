"""Kills, a full disk and a lost checkpoint, with real workers: what is left resumes byte for byte.

Each test starts several workers, which load torch for some 4 s of CPU each.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import psutil
import pytest
from support.build_queue import builds_document, request_document, until
from support.builds import record_toy, tree_bytes
from support.disks import small_disk
from support.serving import serving, serving_process

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

PATIENCE_S = 90.0
SEEDS, SHARDS = "0:10", 30


def post(server, **changes):
    document = request_document(**{"seeds": SEEDS} | changes)
    answer = server.ask("POST", "/v1/builds", json=document)
    assert answer.status == 202, answer.data
    return answer.json()["id"]


def shown(server, build_id):
    return server.ask("GET", f"/v1/builds/{build_id}").json()


def ended(server, build_id):
    active = ("queued", "running")
    return until(lambda: (b := shown(server, build_id))["state"] not in active and b, PATIENCE_S)


def workers_of(pid):
    family = psutil.Process(pid).children(recursive=True)
    return [each for each in family if "cache_service.recording.worker" in each.cmdline()]


def num_commits(root):
    return len(list(root.glob("toy/commits/*/*.json")))


def is_gone(process):
    # An orphan stays a zombie until the machine's first process looks at it.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted build by hand leaves."""
    folder = tmp_path_factory.mktemp("whole")
    record_toy(str(folder / "toy"), seeds=SEEDS, batch_size=4)
    return tree_bytes(folder / "toy")


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


def test_a_build_whose_worker_is_killed_is_byte_identical(root, whole):
    with serving(root, builds=builds_document(batch_size=4)) as server:
        build_id = post(server)
        until(lambda: num_commits(root) >= 3, PATIENCE_S)
        (worker,) = workers_of(os.getpid())
        worker.kill()
        assert ended(server, build_id)["state"] == "done"
        assert shown(server, build_id)["progress"]["shards_done"] == SHARDS
    assert tree_bytes(root / "toy") == whole


def test_a_build_outlives_a_killed_server_and_a_stopped_one(root, whole, tmp_path):
    settings = {"builds": builds_document(batch_size=4), "log": tmp_path / "log"}
    with serving_process(root, **settings) as server:
        build_id = post(server)
        until(lambda: num_commits(root) >= 3, PATIENCE_S)
        orphans = workers_of(server.process.pid)
        server.process.kill()
        server.process.wait()
        assert len(orphans) == 1
        until(lambda: all(map(is_gone, orphans)))
    left = num_commits(root)
    assert left < SHARDS
    with serving_process(root, **settings) as server:
        until(lambda: num_commits(root) > left, PATIENCE_S)
        (worker,) = workers_of(server.process.pid)
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
        assert time.monotonic() - begun < 5
        assert is_gone(worker)
    assert not (root / "toy" / ".scratch").exists()
    left = num_commits(root)
    with serving_process(root, **settings) as server:
        found = ended(server, build_id)
    assert found["state"] == "done"
    assert found["progress"]["shards_committed"] == SHARDS - left
    assert tree_bytes(root / "toy") == whole


def test_a_full_disk_fails_the_build_and_the_same_request_resumes(tmp_path, whole):
    with small_disk(tmp_path / "disk", "300k") as disk:
        builds = builds_document(batch_size=4, database=str(tmp_path / "builds.sqlite"))
        with serving(disk, builds=builds) as server:
            failed = ended(server, post(server))
            assert (failed["state"], failed["error"]["code"]) == ("failed", "out_of_space")
            assert failed["error"]["status"] == 507
            assert str(disk) not in failed["error"]["detail"]
            assert 0 < num_commits(disk) < SHARDS
            subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            again = ended(server, post(server))
        assert (again["state"], again["id"] != failed["id"]) == ("done", True)
        assert tree_bytes(disk / "toy") == whole


def test_a_canceled_build_keeps_its_rows_and_the_same_request_finishes_it(root, whole):
    with serving(root, builds=builds_document(batch_size=4)) as server:
        build_id = post(server)
        until(lambda: num_commits(root) >= 3, PATIENCE_S)
        assert server.ask("DELETE", f"/v1/builds/{build_id}").status == 202
        assert ended(server, build_id)["state"] == "canceled"
        assert 3 <= num_commits(root) < SHARDS
        assert not (root / "toy" / ".scratch").exists()
        assert ended(server, post(server))["state"] == "done"
        assert tree_bytes(root / "toy") == whole
        other = ended(server, post(server, teacher="wide"))
    assert (other["error"]["code"], other["error"]["status"]) == ("spec_mismatch", 409)
    assert str(root) not in other["error"]["detail"]
    assert tree_bytes(root / "toy") == whole


def test_a_lost_checkpoint_fails_in_one_line_without_the_servers_paths(root):
    with serving(root, builds=builds_document(batch_size=4)) as server:
        failed = ended(server, post(server, teacher="lost"))
    assert (failed["state"], failed["error"]["code"]) == ("failed", "config")
    assert "/secret" not in str(failed)
    assert "\n" not in failed["error"]["detail"]
