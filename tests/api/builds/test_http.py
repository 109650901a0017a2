"""Builds over HTTP: asked for, watched, canceled, refused. The workers load no torch."""

from __future__ import annotations

import json
import subprocess
import threading
import time

import fastapi.routing
import pytest
import urllib3
from support.build_queue import builds_document, request_document, scripted, until
from support.builds import record_toy
from support.caches import make_spec, write_cache
from support.command import kd_cache
from support.disks import small_disk
from support.serving import BUILD_TOKEN, READ_TOKEN, TOKENS, serving

from cache_service.api.builds import supervisor, worker
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.settings import BuildsConfig
from cache_service.errors import ConfigError, RowsNotBuiltError
from cache_service.remote.source import open_source

SLOW = """
import signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
say(progress=progress(1))
while not os.path.exists(os.path.join(folder, "go")):
    time.sleep(0.01)
say(progress=progress(9))
say(done=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "POLL_S", 0.01)
    monkeypatch.setattr(worker, "STORE_S", 0.0)
    monkeypatch.setattr(supervisor, "COMMAND", scripted(tmp_path, SLOW))


def test_a_cache_that_is_queued_is_awaited_and_one_that_is_not_is_refused(root):
    with serving(root, builds=builds_document()) as server:
        url = server.cache_url("toy")
        assert server.ask("GET", "/v1/caches/toy").status == 404
        build = server.ask("POST", "/v1/builds", json=request_document()).json()["id"]
        for path in ("", "/zarr/zarr.json", "/rows?seed=0&start=0&stop=1"):
            found = server.ask("GET", f"/v1/caches/toy{path}")
            assert (found.status, found.json()["code"]) == (503, "rows_not_built")
            assert int(found.headers["retry-after"]) > 0
        with pytest.raises(RowsNotBuiltError, match="is not recorded yet"):
            open_source(url)
        spec = make_spec(num_samples=8)
        recording = threading.Timer(0.2, write_cache, [str(root / "toy"), spec])
        recording.start()
        assert open_source(url, wait_s=60.0).spec == spec
        recording.join()
        assert server.ask("DELETE", f"/v1/builds/{build}").status in (200, 202)
        assert server.ask("GET", "/v1/caches/other").status == 404


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "root"
    folder.mkdir()
    return folder


@pytest.fixture
def server(root):
    with serving(root, builds=builds_document(max_queued=2)) as running:
        yield running


def post(server, **changes):
    token = changes.pop("token", None)
    return server.ask("POST", "/v1/builds", json=request_document(**changes), token=token)


def state_of(server, build_id):
    return server.ask("GET", f"/v1/builds/{build_id}").json()["state"]


def problem(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    found = answer.json()
    assert found["status"] == answer.status
    assert "secret" not in answer.data.decode()
    return answer.status, found["code"]


def events_of(text):
    """The data of each event, and how many comments kept the line open."""
    lines = text.splitlines()
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    return data, sum(line.startswith(":") for line in lines)


def stream(server, build_id, **headers):
    pool = urllib3.PoolManager(retries=False)
    return pool.request(
        "GET", f"{server.url}/v1/builds/{build_id}/events", headers=headers, preload_content=False
    )


def test_a_build_is_accepted_shown_and_done(server, tmp_path):
    answer = post(server)
    asked = answer.json()
    assert (answer.status, asked["state"]) == (202, "queued")
    assert answer.headers["location"] == f"/v1/builds/{asked['id']}"
    until(lambda: state_of(server, asked["id"]) == "running")
    assert "kdcache_builds_running 1.0" in server.ask("GET", "/metrics").data.decode()
    (tmp_path / "go").touch()
    until(lambda: state_of(server, asked["id"]) == "done")
    until(lambda: "kdcache_builds_running 0.0" in server.ask("GET", "/metrics").data.decode())
    shown = server.ask("GET", answer.headers["location"]).json()
    assert shown["progress"]["shards_done"] == 9
    assert (shown["teacher"], shown["cache"], shown["seeds"]) == ("tiny", "toy", "0:2")
    assert server.ask("GET", "/v1/builds").json()["builds"] == [shown]


def test_the_same_request_finds_its_build(server):
    first, again = post(server), post(server, priority=7)
    assert first.json()["id"] == again.json()["id"]
    assert (again.status, again.json()["priority"]) == (202, 7)


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"teacher": "resnet"}, 422, "config"),
        ({"dataset": "/etc"}, 422, "request"),
        ({"cache": "../toy"}, 422, "request"),
        ({"cache": ".kd-cache"}, 422, "request"),
        ({"seeds": "0:2000000000"}, 422, "request"),
        ({"seeds": "999:1001"}, 422, "config"),
        ({"augment": {"size": 16, "callable": "os:system"}}, 422, "config"),
        ({"augment": {"size": 16, "preset": "other"}}, 422, "request"),
        ({"checkpoint": "x.pt"}, 422, "request"),
    ],
)
def test_what_cannot_be_built_is_a_problem_that_tells_no_paths(server, changes, status, code):
    answer = post(server, **changes)
    assert problem(answer) == (status, code)
    assert answer.json()["detail"].endswith((".", "?"))
    assert answer.json()["hint"].endswith(".")
    assert server.ask("GET", "/v1/builds").json() == {"builds": [], "out_of_space": None}


def test_a_cache_queued_with_other_settings_and_a_full_queue_are_problems(server):
    running = post(server, cache="a").json()["id"]
    until(lambda: state_of(server, running) == "running")
    assert problem(post(server, cache="a", teacher="wide")) == (409, "spec_mismatch")
    assert [post(server, cache=name).status for name in "bc"] == [202, 202]
    full = post(server, cache="d")
    assert problem(full) == (429, "queue_full")
    assert int(full.headers["retry-after"]) > 0


def test_an_unknown_build_is_404_everywhere_and_an_odd_id_422(server):
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        unknown = server.ask(method, f"/v1/builds/{'0' * 16}{path}")
        assert problem(unknown) == (404, "no_such_build")
        assert problem(server.ask(method, f"/v1/builds/%00x{path}")) == (422, "request")


def test_canceling_is_202_while_it_ends_and_200_once_it_has(server):
    runs, waits = (post(server, cache=name).json()["id"] for name in "ab")
    until(lambda: state_of(server, runs) == "running")
    ended = server.ask("DELETE", f"/v1/builds/{waits}")
    assert (ended.status, ended.json()["state"]) == (200, "canceled")
    ending = server.ask("DELETE", f"/v1/builds/{runs}")
    assert (ending.status, ending.json()["canceling"]) == (202, True)
    until(lambda: state_of(server, runs) == "canceled")
    assert server.ask("DELETE", f"/v1/builds/{runs}").status == 200


def test_events_say_the_present_first_then_each_change_and_end_with_the_build(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(fastapi.routing, "_PING_INTERVAL", 0.1)
    build_id = post(server).json()["id"]
    until(lambda: state_of(server, build_id) == "running")
    answer = stream(server, build_id, **{"Last-Event-ID": "never sent"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    first = answer.read1(65536).decode()
    time.sleep(0.5)
    (tmp_path / "go").touch()
    data, pings = events_of(first + answer.read().decode())
    assert data[0]["state"] == "running"
    assert data[-1]["state"] == "done"
    assert [each["version"] for each in data] == sorted({each["version"] for each in data})
    assert pings >= 2
    late, _ = events_of(stream(server, build_id).read().decode())
    assert late == [data[-1]]


def test_streams_end_and_builds_are_kept_when_the_server_stops(root, tmp_path):
    with serving(root, builds=builds_document()) as server:
        build_id = post(server).json()["id"]
        until(lambda: state_of(server, build_id) == "running")
        answer = stream(server, build_id)
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    assert events_of(answer.read().decode())[0][0]["state"] == "running"
    (tmp_path / "go").touch()
    with serving(root, builds=builds_document()) as server:
        until(lambda: state_of(server, build_id) == "done")


def test_a_server_without_builds_says_so(root):
    with serving(root) as server:
        assert problem(post(server)) == (404, "builds_off")
        assert problem(server.ask("GET", "/v1/builds")) == (404, "builds_off")


def test_building_takes_the_scope_build_and_watching_the_scope_read(root):
    with serving(root, builds=builds_document(), tokens=TOKENS) as server:
        assert problem(post(server, token=READ_TOKEN)) == (403, "forbidden")
        build_id = post(server, token=BUILD_TOKEN).json()["id"]
        path = f"/v1/builds/{build_id}"
        assert server.ask("GET", path, token=READ_TOKEN).status == 200
        assert server.ask("DELETE", path, token=READ_TOKEN).status == 403
        assert server.ask("DELETE", path, token=BUILD_TOKEN).status in (200, 202)


def test_the_servers_own_files_are_no_cache(server, root):
    post(server)
    assert (root / ".kd-cache" / "builds.sqlite").is_file()
    assert server.ask("GET", "/v1/caches").json() == {"caches": []}
    for path in ("", "/zarr/builds.sqlite", "/rows?seed=0&start=0&stop=1"):
        assert server.ask("GET", f"/v1/caches/.kd-cache{path}").status in (404, 422)


def test_builds_on_a_root_that_cannot_be_written_are_refused_in_one_line(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"builds": builds_document()}))
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "root").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        ended = kd_cache("serve", str(disk / "root"), "--config", str(file), "--port", "0")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith(f"error[config]: builds need to write, and {disk}/root (root)")
        assert len(ended.err.splitlines()) <= 2


def test_a_queue_on_a_network_file_system_is_refused_before_another_server_writes_to_it(
    tmp_path, monkeypatch
):
    shared, database = tmp_path / "a share", tmp_path / "builds.sqlite"
    root = shared / "root"
    root.mkdir(parents=True)
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(supervisor, "MOUNTS", mounts)
    for kind, network in (("ext4", None), ("nfs4", "nfs4")):
        point = str(shared).replace(" ", "\\040")
        mounts.write_text(
            "21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
            f"35 21 0:40 / {point} rw - autofs map rw\n"
            f"36 35 0:52 / {point} rw - {kind} host:/x rw\n"
        )
        assert supervisor.network_filesystem(root / ".kd-cache") == network
    assert supervisor.network_filesystem(tmp_path) is None
    with pytest.raises(ConfigError, match=r"builds\.database\) lies on nfs4") as refused:
        Builds(str(root), BuildsConfig.model_validate(builds_document())).check()
    assert "builds.database" in refused.value.hint
    assert not (root / ".kd-cache").exists()
    local = builds_document(database=str(database))
    Builds(str(root), BuildsConfig.model_validate(local)).check()


@pytest.mark.parametrize("kind", ["no database", "a folder"])
def test_a_queue_that_cannot_be_opened_is_refused_in_one_line(tmp_path, kind):
    database = tmp_path / "queue"
    database.mkdir() if kind == "a folder" else database.write_text("a letter to somebody" * 100)
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"builds": builds_document(database=str(database))}))
    (tmp_path / "root").mkdir()
    ended = kd_cache("serve", str(tmp_path / "root"), "--config", str(file), "--port", "0")
    assert (ended.code, ended.out) != (0, "")
    assert ended.err.startswith("error[")
    assert "Traceback" not in ended.err
    assert "queue cannot be used" in ended.err


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"augment": {"preset": "cifar", "size": 18}}, "recipe.size = 16"),
        ({"augment": {"preset": "none", "size": 16}}, "recipe.ops = ["),
        ({"scales": [1]}, "scales = [1, 2]"),
        ({"codec": {"kind": "int8"}}, 'codec.kind = "dense"'),
        ({"layout": {"shard_rows": 64, "chunk_rows": 8}}, "layout.shard_rows = 32"),
        ({"teacher": "other"}, 'teacher.model = "support.toys:tiny_net"'),
    ],
)
def test_another_recipe_under_a_name_that_is_taken_is_refused_at_once(taken, changes, field):
    answer = post(taken, **changes)
    assert problem(answer) == (409, "spec_mismatch")
    assert f"cache toy was recorded with {field}" in answer.json()["detail"]
    assert answer.json()["hint"].startswith("Name another cache")
    assert taken.ask("GET", "/v1/builds").json()["builds"] == []


@pytest.mark.parametrize("changes", [{}, {"seeds": "0:5"}, {"layout": None}])
def test_what_extends_or_finishes_a_cache_is_not_refused(taken, changes):
    assert post(taken, **changes).status == 202


@pytest.fixture
def taken(root):
    """A service whose root has the cache that `request_document` asks for."""
    record_toy(str(root / "toy"), seeds="0:1", workers=0)
    document = builds_document()
    document["teachers"]["other"] = {"model": "resnet8x4", "allow_untrained": True}
    with serving(root, builds=document) as running:
        yield running


def test_who_waits_for_a_build_is_told_where_it_is_in_the_queue(server, caplog):
    first, second = post(server, cache="a").json()["id"], post(server, cache="b").json()["id"]
    until(lambda: state_of(server, first) == "running")
    waits = server.ask("GET", "/v1/caches/b/rows?seed=0&start=0&stop=4")
    assert (waits.status, waits.json()["code"]) == (503, "rows_not_built")
    assert f"Build {second} is number 1 of 1 in the queue." in waits.json()["detail"]
    runs = server.ask("GET", "/v1/caches/a/rows?seed=0&start=0&stop=4").json()["detail"]
    assert f"Build {first} " in runs
    with pytest.raises(RowsNotBuiltError):
        open_source(server.cache_url("b"), wait_s=1.0)
    assert f"Build {second} is number 1 of 1 in the queue." in caplog.text
