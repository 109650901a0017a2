"""A full disk that holds the queue, too: every place tells what happened, and since when."""

from __future__ import annotations

import contextlib
import json
import logging
import time

import pytest
from support.build_queue import builds_document, request_document, scripted, until, wanted
from support.disks import small_disk
from support.serving import serving

from cache_service.api.builds import space, supervisor, worker
from cache_service.api.builds.space import RepeatedWarning, SpaceWatch

FILLS = """
say(progress=progress(1))
with open(os.path.join({disk!r}, "filling"), "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
say(error=dict(code="out_of_space", status=507, detail="no space for toy.", hint="Free some."))
"""

QUEUE_BYTES = 200 << 10
"""Of the disk: enough for the empty queue and a build in it, without the worker's file."""


def filled(disk):
    return FILLS.format(disk=str(disk))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(worker, "POLL_S", 0.01)
    monkeypatch.setattr(worker, "STORE_S", 0.0)
    monkeypatch.setattr(worker, "IDLE_S", 0.05)


@contextlib.contextmanager
def full_service(tmp_path, monkeypatch):
    """A service whose only build has just filled the disk with root and queue."""
    with small_disk(tmp_path / "disk", "400k") as disk:
        monkeypatch.setattr(supervisor, "COMMAND", scripted(tmp_path, filled(disk)))
        began = time.time()
        with serving(disk, builds=builds_document()) as server:
            answer = server.ask("POST", "/v1/builds", json=request_document())
            assert answer.status == 202, answer.data
            build = answer.json()["id"]
            until(lambda: server.ask("GET", f"/v1/builds/{build}").json()["state"] == "failed")
            yield server, build, began, disk


def test_a_full_disk_is_told_by_the_page_the_api_readiness_and_metrics(tmp_path, monkeypatch):
    with full_service(tmp_path, monkeypatch) as (server, build, began, disk):
        page = server.ask("GET", "/").data.decode()
        assert "The disk is full: no build can go on since" in page
        assert 'id="build-1-state">failed<' in page
        assert "rows/s" not in page
        assert " left<" not in page
        shown = server.ask("GET", f"/v1/builds/{build}").json()
        assert shown["error"]["code"] == "out_of_space"
        assert began <= shown["finished_s"] <= time.time()
        assert shown["progress"]["shards_done"] == 1
        assert shown["progress"]["eta_s"] is None
        listed = server.ask("GET", "/v1/builds").json()
        assert listed["builds"][0]["state"] == "failed"
        assert began <= listed["out_of_space"]["since_s"] <= time.time()
        ready = server.ask("GET", "/readyz")
        assert (ready.status, ready.json()["status"]) == (200, "out_of_space")
        assert ready.json()["since"].startswith(time.strftime("%Y-", time.gmtime(began)))
        figures = server.ask("GET", "/metrics").data.decode()
        since = [x for x in figures.splitlines() if x.startswith("kdcache_builds_out_of_space")]
        assert began <= float(since[0].split()[1]) <= time.time()
        assert "kdcache_builds_free_bytes 0.0" in figures
        assert "kdcache_builds_running 0.0" in figures
        assert 'kdcache_builds_ended_total{state="failed"} 1.0' in figures
        events = server.ask("GET", f"/v1/builds/{build}/events").data.decode()
        assert json.loads(events.partition("data: ")[2].splitlines()[0])["state"] == "failed"
        refused = server.ask("POST", "/v1/builds", json=request_document(cache="other"))
        assert (refused.status, refused.json()["code"]) == (507, "out_of_space")
        (disk / "filling").unlink()


def test_the_end_is_stored_once_there_is_space_and_the_next_shard_ends_the_shortage(
    tmp_path, monkeypatch
):
    with full_service(tmp_path, monkeypatch) as (server, build, _, disk):
        first = server.ask("GET", f"/v1/builds/{build}").json()
        (disk / "filling").unlink()
        builds = server.ask("GET", "/v1/builds").json()
        assert builds["out_of_space"] is not None  # 300 kB are no shard
        answer = until(
            lambda: (
                (a := server.ask("POST", "/v1/builds", json=request_document())).status == 202 and a
            )
        )
        assert answer.json()["id"] != build
        again = answer.json()["id"]
        until(lambda: server.ask("GET", f"/v1/builds/{again}").json()["state"] == "failed")
        assert server.ask("GET", f"/v1/builds/{build}").json() == first
        (disk / "filling").unlink()


def test_a_shortage_is_logged_once_a_minute(tmp_path, monkeypatch, caplog):
    clock = [0.0]
    monkeypatch.setattr(space.time, "monotonic", lambda: clock[0])
    watch = SpaceWatch([tmp_path])
    watch.remind()
    assert caplog.records == []
    watch.note_full("no space for toy.")
    for clock[0] in range(0, 130, 5):
        watch.remind()
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert all("no space is left for builds since 20" in line for line in lines)
    assert lines[0].endswith("no space for toy.")


def test_a_shortage_ends_with_a_shard_or_with_much_space_and_keeps_its_beginning(
    tmp_path, monkeypatch
):
    watch, free = SpaceWatch([tmp_path]), [1000]
    monkeypatch.setattr(watch, "free_bytes", lambda: free[0])
    watch.note_full("first")
    watch.note_full("second")
    assert watch.state().detail == "first"
    free[0] += space.FREED_BYTES - 1
    assert watch.state() is not None
    free[0] += 1
    assert watch.state() is None
    watch.note_full("third")
    watch.note_written()
    assert watch.state() is None


def test_a_warning_that_repeats_itself_is_logged_once_a_minute(monkeypatch):
    clock, logged = [0.0], []
    monkeypatch.setattr(space.time, "monotonic", lambda: clock[0])
    warn = RepeatedWarning(logged.append)
    for clock[0] in (0, 1, 59, 61, 62):
        warn("the same")
    warn("another")
    assert logged == ["the same", "the same", "another"]


def test_a_failed_build_is_an_error_in_the_log_with_code_and_reason(tmp_path, caplog):
    script = "say(error=dict(code='dataset', status=422, detail='no images.', hint='Look.'))"
    from support.build_queue import running_builds, until_final

    with (
        caplog.at_level(logging.INFO, logger="kdcache.builds"),
        running_builds(tmp_path, scripted(tmp_path, script)) as builds,
    ):
        failed = until_final(builds, builds.submit(wanted()).id)
    (line,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert line.getMessage().endswith("failed: error[dataset] no images. Look.")
    assert line.fields["build"] == failed.id
    assert line.fields["code"] == "dataset"
