"""Builds on a Ray cluster whose processes start in another folder; actors and drivers are killed.

The cluster is real and runs on this machine: starting it takes some ten seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from support.builds import build_document, record_toy, tree_bytes, write_file
from support.clusters import (
    Head,
    finish,
    kill_between_commits,
    recorders,
    running_head,
    start,
    wait_for,
)
from support.pages import ROOT

from cache_service.errors import StorageError
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.ray_engine import MAX_DEATHS, Dispatcher
from cache_service.recording.shards import Progress, Shard
from cache_service.rows.reader import open_cache

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray leaves sockets and processes behind
SHARDS = [Shard(0, n) for n in range(4)]


def test_shards_of_an_actor_that_died_are_handed_out_again_and_first():
    dispatcher = Dispatcher(SHARDS)
    dispatcher.begin(0)
    dispatcher.begin(1)
    assert [dispatcher.take(0), dispatcher.take(1), dispatcher.take(0)] == SHARDS[:3]
    assert dispatcher.begin(0) == [SHARDS[0], SHARDS[2], SHARDS[3]]
    assert dispatcher.take(1) == SHARDS[0]
    dispatcher.end(1)
    assert not dispatcher.is_finished()
    assert [dispatcher.take(0), dispatcher.take(0)] == [SHARDS[2], SHARDS[3]]
    assert not dispatcher.is_finished()  # they are not committed yet
    dispatcher.end(0)
    assert dispatcher.is_finished()
    assert dispatcher.deaths() == 1


def test_a_stopped_build_hands_out_nothing_and_tells_its_actors():
    dispatcher = Dispatcher(SHARDS)
    dispatcher.begin(0)
    assert not dispatcher.note(0, Progress())
    dispatcher.stop()
    assert dispatcher.take(0) is None
    assert dispatcher.note(0, Progress())


def test_deaths_count_only_without_a_commit_between_them():
    dispatcher = Dispatcher(SHARDS)
    dispatcher.begin(0)
    for _ in range(3 * MAX_DEATHS):
        dispatcher.note(0, Progress(shards_committed=1))
        dispatcher.begin(0)
    for _ in range(MAX_DEATHS - 2):
        dispatcher.begin(0)
    with pytest.raises(StorageError, match=f"died {MAX_DEATHS} times without committing"):
        dispatcher.begin(0)


def test_ray_settings_have_bounds():
    for settings in ({"num_cpus": 0}, {"num_gpus": -1}, {"cpus": 1}, {"working_dir": ""}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BuildConfig.model_validate(build_document("cache", ray=settings))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster whose current folder is another one."""
    with running_head(tmp_path_factory.mktemp("head")) as head:
        yield head


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_a_relative_cache_is_recorded_here_with_the_bytes_of_the_local_engine(tmp_path, cluster):
    record_toy(str(tmp_path / "local"))
    out, err, code = finish(start(tmp_path, cluster, processes=2), 150)
    assert code == 0, err
    result = json.loads(out)  # nothing else is on stdout
    assert result["shards_committed"] == 6
    assert result["deaths"] == 0
    assert tree_bytes(tmp_path / "cache") == tree_bytes(tmp_path / "local")
    shown = [json.loads(line) for line in err.splitlines() if line.startswith('{"event": "shard"')]
    assert shown[-1]["shards_done"] == 6


KILLS = 2
"""Of recording processes, before and after the kill of the driver."""

SLOW = {
    "processes": 2,
    "dataset__args": {"num_samples": 640},
    "dataset__name": "support.slow:slow_patches",
}
"""Twenty shards a seed that take about half a second each."""


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_kills_of_actors_and_of_the_driver_change_no_byte(tmp_path, cluster):
    plain = {"dataset__args": {"num_samples": 640, "delay_s": 0.0}}
    record_toy(str(tmp_path / "local"), **(SLOW | {"processes": 1} | plain))
    killed = start(tmp_path, cluster, **SLOW)
    kill_between_commits(cluster, tmp_path, KILLS)
    killed.kill()
    killed.communicate()  # closes its pipes
    wait_for(
        lambda: not recorders(cluster.pid)
    )  # the cluster ends the actors of a driver that is gone
    running = start(tmp_path, cluster, **SLOW)
    kill_between_commits(cluster, tmp_path, KILLS)
    out, err, code = finish(running, 300)
    assert code == 0, err
    assert json.loads(out)["deaths"] >= 1
    ours, theirs = (rows_of(tmp_path / name) for name in ("cache", "local"))
    assert ours == theirs


def rows_of(folder):
    """Every object but the root document, which names the arguments of the dataset."""
    return {key: body for key, body in tree_bytes(folder).items() if key != "zarr.json"}


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_more_processes_than_the_cluster_has_room_for_do_not_hold_up_the_end(tmp_path, cluster):
    out, err, code = finish(start(tmp_path, cluster, processes=5), 150)
    assert code == 0, err
    assert json.loads(out)["shards_committed"] == 6


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_an_actor_that_stands_still_holds_up_no_more_than_the_shards_it_has(tmp_path, cluster):
    running = start(tmp_path, cluster, **SLOW)
    commits = tmp_path / "cache" / "commits"
    wait_for(lambda: len(recorders(cluster.pid)) == 2 and len(list(commits.rglob("*.json"))) > 1)
    slow = recorders(cluster.pid)[0]
    slow.suspend()
    try:  # one shard is written, one recorded, and one rendered ahead
        wait_for(lambda: len(list(commits.rglob("*.json"))) >= 40 - 3)
    finally:
        slow.resume()
    out, err, code = finish(running, 60)
    assert code == 0, err
    assert json.loads(out)["shards_committed"] == 40


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_ctrl_c_keeps_the_committed_shards_and_leaves_no_actor(tmp_path, cluster):
    running = start(tmp_path, cluster, **SLOW)
    commits = tmp_path / "cache" / "commits"
    wait_for(lambda: len(list(commits.rglob("*.json"))) > 1)
    running.send_signal(signal.SIGINT)
    _, err, code = finish(running, 60)
    assert code == 130, err
    assert open_cache(str(tmp_path / "cache")).commits()
    wait_for(lambda: not recorders(cluster.pid))


@pytest.mark.faults
@pytest.mark.timeout(100)
def test_no_cluster_is_one_line(tmp_path):
    pytest.importorskip("ray", reason="the ray extra is not installed")
    _, err, code = finish(start(tmp_path, Head("127.0.0.1:1", 0)), 90)
    assert code == 2, err
    assert "no connection to a cluster at 127.0.0.1:1" in err


@pytest.mark.faults
@pytest.mark.timeout(100)
def test_a_cache_that_the_driver_cannot_see_is_not_reported_as_recorded(tmp_path, cluster):
    (tmp_path / "cache").mkdir()
    hidden = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none cache && exec "$@"', "sh"]
    probe = subprocess.run([*hidden, "true"], cwd=tmp_path, capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("this user may not mount a folder")
    _, err, code = finish(start(tmp_path, cluster, before=hidden), 90)
    assert code == 4, err
    assert "error[rows_not_built]: 6 shards were recorded into" in err
    assert "does not have them" in err


@pytest.mark.faults
@pytest.mark.timeout(100)
def test_more_than_the_cluster_has_is_refused_before_anything_is_loaded(tmp_path, cluster):
    _, err, code = finish(start(tmp_path, cluster, device="cuda"), 90)
    assert code == 2, err
    assert "1 GPUs, and the whole cluster has 0" in err
    assert not (tmp_path / "cache").exists()


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_the_example_with_ray_data_records_the_same_bytes_though_an_actor_is_killed(tmp_path):
    pytest.importorskip("ray", reason="the ray extra is not installed")
    changes = SLOW | {"processes": 1, "layout": {"shard_rows": 64, "chunk_rows": 8}}
    record_toy(str(tmp_path / "local"), **changes)
    file = write_file(tmp_path / "build.yaml", build_document("cache", **changes))
    running = subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / "ray_data.py"), file.name, "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": "local"},
    )
    commits = tmp_path / "cache" / "commits"
    wait_for(lambda: list(commits.rglob("*.json")))
    wait_for(lambda: recorders(running.pid, "ray::MapWorker"))[0].kill()
    out, err, code = finish(running, 200)
    assert code == 0, err
    assert "shards recorded" in out
    assert tree_bytes(tmp_path / "cache") == tree_bytes(tmp_path / "local")
