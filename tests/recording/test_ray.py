"""Builds on a Ray cluster whose processes start in another folder; actors and drivers are killed.

The cluster is real and runs on this machine: starting it takes some ten seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

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
from cache_service.recording.ray_engine import (
    MAX_DEATHS,
    Dispatcher,
    _of_actor,
    _place,
    _resources,
    _sum,
)
from cache_service.recording.shards import Progress, Shard
from cache_service.rows.reader import open_cache
from cache_service.storage.local import LocalStorage

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
    assert not dispatcher.status().is_finished
    assert [dispatcher.take(0), dispatcher.take(0)] == [SHARDS[2], SHARDS[3]]
    assert not dispatcher.status().is_finished  # they are not committed yet
    dispatcher.end(0)
    assert dispatcher.status().is_finished
    assert dispatcher.status().deaths == 1


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


def test_the_time_left_is_that_of_the_rows_without_an_answer_at_the_rate_of_the_living():
    dispatcher = Dispatcher(SHARDS)
    dead = Progress(shards_committed=1, rows_done=32, rows_answered=48, rows_per_s=10.0)
    dispatcher.begin(0)
    dispatcher.note(0, dead)
    dispatcher.begin(0)
    dispatcher.note(0, Progress(rows_answered=16, rows_per_s=4.0))
    shown = _sum(dispatcher.status(), rows=(32, 160), shards=(1, 5))
    assert (shown.rows_done, shown.rows_answered, shown.rows_per_s) == (64, 80, 4.0)
    assert shown.eta_s == (160 - 80) / 4.0
    dispatcher.note(0, Progress(shards_committed=3, rows_done=96, rows_answered=96, rows_per_s=4.0))
    assert _sum(dispatcher.status(), rows=(32, 160), shards=(1, 5)).eta_s == 0


@pytest.mark.parametrize(
    ("device", "settings", "cpus_and_gpus"),
    [
        ("cpu", {}, (1, 0)),
        ("auto", {}, (1, 1)),
        ("cuda", {"num_cpus": 4}, (4, 1)),
        ("auto", {"num_gpus": 0.5}, (1, 0.5)),
        ("cpu", {"num_gpus": 2, "num_cpus": 0.5}, (0.5, 2)),
    ],
)
def test_an_actor_asks_for_what_the_build_file_says(device, settings, cpus_and_gpus):
    document = build_document("cache", device=device, workers=None, ray=settings)
    config = BuildConfig.model_validate(document)
    found = _resources(config, {"CPU": 8.0, "GPU": 2.0})
    assert (found["num_cpus"], found["num_gpus"]) == cpus_and_gpus


@pytest.mark.parametrize(
    ("workers", "settings", "renderers"), [(None, {}, 0), (None, {"num_cpus": 4}, 3), (2, {}, 2)]
)
def test_an_actor_renders_in_as_many_processes_as_it_has_cpus_for(workers, settings, renderers):
    document = build_document("cache", workers=workers, processes=5, ray=settings)
    actor = _of_actor(BuildConfig.model_validate(document))
    assert (actor.processes, actor.workers) == (1, renderers)


def test_machines_without_the_folder_of_the_command_get_absolute_paths(tmp_path, monkeypatch):
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    written = {
        "dataset__root": "photos",
        "teacher__checkpoint": "best.pt",
        "teacher__classes": "order.txt",
    }
    placed = _place(BuildConfig.model_validate(build_document("cache", **written)))
    monkeypatch.chdir(tmp_path)
    config = placed.enter()
    assert Path.cwd() == folder
    assert (config.dataset.root, config.teacher.checkpoint) == ("photos", "best.pt")
    assert config.cache == str(folder / "cache")
    monkeypatch.chdir(tmp_path)
    folder.rmdir()
    config = placed.enter()
    assert Path.cwd() == tmp_path
    assert config.dataset.root == str(folder / "photos")
    assert config.teacher.checkpoint == str(folder / "best.pt")
    assert config.teacher.classes == str(folder / "order.txt")


def test_ray_settings_have_bounds():
    for settings in ({"num_cpus": 0}, {"num_gpus": -1}, {"cpus": 1}, {"working_dir": ""}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            BuildConfig.model_validate(build_document("cache", ray=settings))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster whose current folder is another one."""
    with running_head(tmp_path_factory.mktemp("head")) as head:
        yield head


TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "t" * 32}
TOYS = ROOT / "tests" / "support" / "toys.py"


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """A cluster that asks for a token, and whose processes find no modules of the tests."""
    environment = os.environ | TOKEN | {"PYTHONPATH": str(ROOT)}
    with running_head(tmp_path_factory.mktemp("head"), environment) as head:
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
    assert shown[-1]["rows_answered"] == shown[-1]["rows_total"] == 192
    assert shown[-1]["eta_s"] == 0


KILLS = 5
"""Of recording processes, before and after the kill of the driver."""

SLOW = {
    "processes": 2,
    "dataset__args": {"num_samples": 640},
    "dataset__name": "support.slow:slow_patches",
}
"""Twenty shards a seed that take about half a second each."""

AT_ONCE = SLOW | {"processes": 1, "dataset__args": {"num_samples": 640, "delay_s": 0.0}}
"""The same by the local engine and without the delay."""


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_kills_of_actors_and_of_the_driver_change_no_byte(tmp_path, cluster):
    record_toy(str(tmp_path / "local"), **AT_ONCE)
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
    deaths = json.loads(out)["deaths"]
    assert 2 <= deaths <= KILLS  # one that is killed while it starts died once in all
    assert f"processes that died and were started again: {deaths}" in err
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
    wait_for(lambda: len(recorders(cluster.pid)) == 2 and len(list(commits.glob("*/*.json"))) > 1)
    slow = recorders(cluster.pid)[0]
    slow.suspend()
    try:  # one shard is written, one recorded, and one rendered ahead
        wait_for(lambda: len(list(commits.glob("*/*.json"))) >= 40 - 3)
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
    wait_for(lambda: len(list(commits.glob("*/*.json"))) > 1)
    running.send_signal(signal.SIGINT)
    _, err, code = finish(running, 60)
    assert code == 130, err
    assert open_cache(str(tmp_path / "cache")).commits()
    wait_for(lambda: not recorders(cluster.pid))
    _, err, code = finish(start(tmp_path, cluster, **SLOW), 100)
    assert code == 0, err
    record_toy(str(tmp_path / "local"), **AT_ONCE)
    assert rows_of(tmp_path / "cache") == rows_of(tmp_path / "local")


@pytest.mark.faults
@pytest.mark.timeout(200)
def test_a_shard_that_another_builder_has_reserved_is_awaited(tmp_path):
    pytest.importorskip("ray", reason="the ray extra is not installed")
    record_toy(str(tmp_path / "local"))
    other = LocalStorage(str(tmp_path / "cache"))
    assert other.begin("0-1")
    running = start(tmp_path, None)  # on a cluster of its own
    commits = tmp_path / "cache" / "commits"
    wait_for(lambda: len(list(commits.glob("*/*.json"))) == 5)
    with pytest.raises(subprocess.TimeoutExpired):
        running.wait(10)
    other.end("0-1")
    out, err, code = finish(running, 60)
    assert code == 0, err
    assert json.loads(out)["shards_committed"] == 6
    assert tree_bytes(tmp_path / "cache") == tree_bytes(tmp_path / "local")


@pytest.mark.faults
@pytest.mark.timeout(100)
def test_a_dispatcher_that_is_lost_is_one_line(tmp_path, cluster):
    running = start(tmp_path, cluster, **SLOW)
    commits = tmp_path / "cache" / "commits"
    wait_for(lambda: list(commits.glob("*/*.json")))
    wait_for(lambda: recorders(cluster.pid, "ray::Dispatcher"))[0].kill()
    _, err, code = finish(running, 60)
    assert code == 1, err
    assert "error[storage]: a process of the build was lost" in err
    wait_for(lambda: not recorders(cluster.pid))


OWN = """
import os
assert os.environ["PLACE"] == "here"
from toys_of_mine import patches, tiny_net
"""
"""A module of a user's that needs a variable."""


@pytest.mark.faults
@pytest.mark.timeout(300)
@pytest.mark.parametrize("settings", [{}, {"working_dir": "."}], ids=["same folder", "copied"])
def test_modules_and_variables_of_the_command_reach_a_cluster_that_has_neither(
    tmp_path, guarded, settings
):
    shutil.copyfile(TOYS, tmp_path / "toys_of_mine.py")
    (tmp_path / "own.py").write_text(OWN)
    names = {"dataset__name": "own:patches", "teacher__model": "own:tiny_net"}
    ray = {"env": ["PLACE"], **settings}
    running = start(tmp_path, guarded, environment=TOKEN | {"PLACE": "here"}, ray=ray, **names)
    out, err, code = finish(running, 100)
    assert code == 0, err
    assert json.loads(out)["shards_committed"] == 6


@pytest.mark.faults
@pytest.mark.timeout(100)
def test_a_wrong_token_is_one_line_without_either_token(tmp_path, guarded):
    wrong = TOKEN | {"RAY_AUTH_TOKEN": "w" * 32}
    _, err, code = finish(start(tmp_path, guarded, environment=wrong), 90)
    assert code == 2, err
    assert err.startswith("error[config]: --engine ray: no connection to a cluster at 127.0.0.1:")
    assert err.count("\n") == 1, err
    assert not any(each in err for each in (TOKEN["RAY_AUTH_TOKEN"], "w" * 32))


@pytest.mark.faults
@pytest.mark.timeout(100)
def test_no_cluster_is_one_line(tmp_path):
    pytest.importorskip("ray", reason="the ray extra is not installed")
    _, err, code = finish(start(tmp_path, Head("127.0.0.1:1", 0)), 90)
    assert code == 2, err
    assert "no connection to a cluster at 127.0.0.1:1" in err
    assert err.count("\n") == 1


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
    assert err.count(f"{tmp_path / 'cache'} on {socket.gethostname()}") == 2
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
    wait_for(lambda: list(commits.glob("*/*.json")))
    wait_for(lambda: recorders(running.pid, "ray::MapWorker"))[0].kill()
    out, err, code = finish(running, 200)
    assert code == 0, err
    assert "shards recorded" in out
    assert tree_bytes(tmp_path / "cache") == tree_bytes(tmp_path / "local")
