"""What becomes of a build when its worker works, fails, dies, hangs, or is told to end.

The workers are real processes that speak as the real one does, without loading torch.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from support.build_queue import (
    builds_document,
    running_builds,
    scripted,
    until,
    until_final,
    wanted,
)
from support.builds import build_document

from cache_service import processes
from cache_service.api.builds import worker
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.settings import BuildsConfig
from cache_service.recording.build_config import BuildConfig

FINISHES = "say(progress=progress(9)); say(done=True)"
DIES = "os.kill(os.getpid(), signal.SIGKILL)"
WORKS = "say(progress=progress(1)); time.sleep(600)"
OBEYS = f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); {WORKS}"
DEAF = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {WORKS}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(worker, "POLL_S", 0.01)
    monkeypatch.setattr(worker, "STORE_S", 0.0)
    monkeypatch.setattr(worker, "IDLE_S", 0.05)


def num_lives(tmp_path):
    return len((tmp_path / "lives").read_text().split())


def lives_of(tmp_path):
    return [int(line) for line in (tmp_path / "lives").read_text().split()]


def is_alive(pid):
    # An orphan stays a zombie until the machine's first process looks at it.
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"


def test_a_build_that_ends_is_done_with_its_last_progress(tmp_path):
    with running_builds(tmp_path, scripted(tmp_path, FINISHES)) as builds:
        ended = until_final(builds, builds.submit(wanted()).id)
    assert (ended.state, ended.error, ended.device) == ("done", None, "cpu")
    assert (ended.progress.shards_done, ended.progress.eta_s) == (9, None)


def test_a_worker_gets_the_operators_settings_and_the_cache_below_root(tmp_path):
    script = "open(os.path.join(folder, 'job'), 'w').write(json.dumps(job)); " + FINISHES
    with running_builds(tmp_path, scripted(tmp_path, script)) as builds:
        until_final(builds, builds.submit(wanted()).id)
    job = (tmp_path / "job").read_text()
    assert f'"cache": "{tmp_path}/toy"' in job
    assert '"batch_size": 16' in job
    assert '"device": "cpu"' in job


def test_the_refusal_of_a_worker_is_the_builds_error_without_the_servers_paths(tmp_path):
    script = (
        "say(error=dict(code='dataset', status=422, hint='Look into /secret/place/of.pt.', "
        f"detail='no /secret/place/of.pt for {tmp_path}/toy.'))"
    )
    with running_builds(tmp_path, scripted(tmp_path, script)) as builds:
        failed = until_final(builds, builds.submit(wanted(teacher="lost")).id)
    assert (failed.state, failed.error.code, failed.error.status) == ("failed", "dataset", 422)
    assert failed.error.detail == "no ... for toy."
    assert failed.error.hint == "Look into ...."


def test_a_killed_worker_is_replaced_and_the_build_goes_on(tmp_path):
    script = f"say(progress=progress(life()))\nif life() < 6: {DIES}\n{FINISHES}"
    with running_builds(tmp_path, scripted(tmp_path, script)) as builds:
        assert until_final(builds, builds.submit(wanted()).id).state == "done"
    assert num_lives(tmp_path) == 6


def test_commits_that_only_the_next_worker_tells_of_count_as_progress(tmp_path):
    script = (
        "lives = life(); say(progress={**progress(0), 'shards_done': lives})\n"
        f"if lives < 6: {DIES}\n{FINISHES}"
    )
    with running_builds(tmp_path, scripted(tmp_path, script)) as builds:
        assert until_final(builds, builds.submit(wanted()).id).state == "done"
    assert num_lives(tmp_path) == 6


def test_a_worker_that_keeps_dying_fails_its_build_after_a_few_lives(tmp_path):
    with running_builds(tmp_path, scripted(tmp_path, f"life(); {DIES}")) as builds:
        failed = until_final(builds, builds.submit(wanted()).id)
        assert num_lives(tmp_path) == processes.MAX_RESTARTS + 1
        assert failed.error.code == "worker_failed"
        assert "signal 9" in failed.error.detail
        # The device continues with the next build.
        assert until_final(builds, builds.submit(wanted(cache="next")).id).state == "failed"


def test_a_crash_fails_the_build_at_once_with_the_last_line_of_the_traceback(tmp_path):
    script = "life(); raise RuntimeError('CUDA error: no kernel in /secret/place/of.pt')"
    with running_builds(tmp_path, scripted(tmp_path, script)) as builds:
        failed = until_final(builds, builds.submit(wanted()).id)
    assert num_lives(tmp_path) == 1
    assert failed.error.detail.endswith("RuntimeError: CUDA error: no kernel in ...")


def test_a_worker_that_says_nothing_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "START_S", 0.1)
    script = f"if life() == 1: time.sleep(600)\n{FINISHES}"
    with running_builds(tmp_path, scripted(tmp_path, script), stall_s=0.3) as builds:
        assert until_final(builds, builds.submit(wanted()).id).state == "done"
    assert num_lives(tmp_path) == 2
    assert not any(map(is_alive, lives_of(tmp_path)))


def test_a_fault_of_the_server_fails_the_build_and_the_device_goes_on(tmp_path, caplog):
    script = f"if life() > 1:\n    {FINISHES}\nelse:\n    say(progress=dict(odd=1))"
    with running_builds(tmp_path, scripted(tmp_path, script)) as builds:
        ended = until_final(builds, builds.submit(wanted()).id)
        assert (ended.state, ended.error) == ("failed", worker.UNEXPECTED)
        assert "odd" in caplog.text
        assert until_final(builds, builds.submit(wanted()).id).state == "done"


def test_a_worker_that_cannot_be_started_fails_its_build(tmp_path):
    with running_builds(tmp_path, ("/nowhere/python",)) as builds:
        failed = until_final(builds, builds.submit(wanted()).id)
    assert failed.error.detail == "no worker can be started: No such file or directory."


def test_a_canceled_build_ends_as_soon_as_its_worker_does(tmp_path):
    with running_builds(tmp_path, scripted(tmp_path, OBEYS)) as builds:
        build = builds.submit(wanted())
        until(lambda: builds.queue.get(build.id).progress)
        assert builds.cancel(build.id).canceling
        canceled = until_final(builds, build.id)
        assert (canceled.state, canceled.error) == ("canceled", None)
        assert canceled.progress.shards_done == 1


def test_a_canceled_worker_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "CANCEL_S", 0.2)
    with running_builds(tmp_path, scripted(tmp_path, f"life(); {DEAF}")) as builds:
        build = builds.submit(wanted())
        until(lambda: builds.queue.get(build.id).progress)
        builds.cancel(build.id)
        assert until_final(builds, build.id).state == "canceled"
        assert not any(map(is_alive, lives_of(tmp_path)))


@pytest.mark.parametrize("script", [OBEYS, DEAF], ids=["obeys", "deaf"])
def test_a_stopping_server_ends_its_workers_within_five_seconds_and_the_next_one_resumes(
    tmp_path, script
):
    with running_builds(tmp_path, scripted(tmp_path, f"life(); {script}")) as builds:
        build = builds.submit(wanted())
        until(lambda: builds.queue.get(build.id).progress)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert not any(map(is_alive, lives_of(tmp_path)))
    with running_builds(tmp_path, scripted(tmp_path, FINISHES)) as builds:
        assert until_final(builds, build.id).state == "done"


def test_awaited_shards_reach_the_worker_whenever_they_are_asked_for(tmp_path):
    script = """
say(progress=progress(0))
heard = []
while len(heard) < 4:
    heard += json.loads(sys.stdin.readline())["prioritize"]
    open(os.path.join(folder, "heard"), "w").write(json.dumps(heard))
say(done=True)
"""
    with running_builds(tmp_path, scripted(tmp_path, script)) as builds:
        build = builds.submit(wanted(seeds="0:2"))
        assert builds.queue.prioritize("toy", 1, [2, 1])
        until(lambda: (tmp_path / "heard").exists())
        assert builds.queue.prioritize("toy", 0, [2])
        assert builds.queue.prioritize("toy", 0, [2, 1])
        assert not builds.queue.prioritize("toy", 2, [0])
        assert until_final(builds, build.id).state == "done"
    assert (tmp_path / "heard").read_text() == "[[1, 2], [1, 1], [0, 2], [0, 1]]"


def test_a_replaced_worker_hears_again_what_is_awaited(tmp_path):
    script = f"""
line = sys.stdin.readline()
if life() == 1: {DIES}
open(os.path.join(folder, "heard"), "w").write(line)
say(done=True)
"""
    with running_builds(tmp_path, scripted(tmp_path, script)) as builds:
        build = builds.submit(wanted())
        builds.queue.prioritize("toy", 1, [2])
        until_final(builds, build.id)
    assert (tmp_path / "heard").read_text().strip() == '{"prioritize": [[1, 2]]}'


def test_devices_run_side_by_side_and_one_cache_on_one_of_them(tmp_path):
    with running_builds(
        tmp_path, scripted(tmp_path, OBEYS), devices=["cuda:0", "cuda:1", "cpu"]
    ) as builds:
        ids = [builds.submit(wanted(cache=name, seeds=s)).id for name, s in (("a", 0), ("a", 1))]
        other = builds.submit(wanted(cache="b")).id
        until(lambda: builds.queue.counts() == {"queued": 1, "running": 2})
        time.sleep(0.2)
        assert builds.queue.counts() == {"queued": 1, "running": 2}
        running = [builds.queue.get(each) for each in (ids[0], other)]
        assert len({each.device for each in running}) == 2
        for each in (*ids, other):
            builds.cancel(each)


def test_a_teacher_that_left_the_configuration_fails_its_build_and_not_the_server(tmp_path):
    with running_builds(tmp_path, scripted(tmp_path, OBEYS)) as builds:
        build = builds.submit(wanted())
    teachers = {"other": {"model": "support.toys:tiny_net"}}
    with running_builds(tmp_path, scripted(tmp_path, FINISHES), teachers=teachers) as builds:
        failed = until_final(builds, build.id)
    assert failed.error.code == "config"
    assert "teacher 'tiny' is not one of this server's" in failed.error.detail


def test_a_worker_ends_when_its_server_is_killed(tmp_path):
    # The real worker, which watches its input while it still loads torch.
    server = (
        "import sys, time\n"
        "from cache_service.recording.build_config import BuildConfig\n"
        "from cache_service.recording.pool import job_message, start_worker\n"
        "config = BuildConfig.model_validate_json(sys.argv[1])\n"
        "print(start_worker(job_message(config, config.seeds)).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    document = build_document(str(tmp_path / "c"), seeds="0:1000")
    config = BuildConfig.model_validate(document).model_dump_json()
    child = subprocess.Popen([sys.executable, "-c", server, config], stdout=subprocess.PIPE)
    with child.stdout:
        pid = int(child.stdout.readline())
    time.sleep(0.5)
    assert is_alive(pid)
    child.send_signal(signal.SIGKILL)
    child.wait()
    until(lambda: not is_alive(pid), 10)


def test_prometheus_reads_rows_restarts_and_ends(tmp_path):
    script = (
        f"say(progress=progress(0)); say(progress=progress(9))\nif life() < 3: {DIES}\n{FINISHES}"
    )
    registry = CollectorRegistry()
    config = BuildsConfig.model_validate(builds_document())
    builds = Builds(str(tmp_path), config, registry=registry, command=scripted(tmp_path, script))
    builds.start()
    until_final(builds, builds.submit(wanted()).id)
    builds.stop()
    value = registry.get_sample_value
    assert value("kdcache_build_rows_total") == 27
    assert value("kdcache_build_worker_restarts_total") == 2
    assert value("kdcache_builds_ended_total", {"state": "done"}) == 1
    assert value("kdcache_build_rows_per_second", {"device": "cpu"}) == 0
    assert value("kdcache_builds_queued") == 0
