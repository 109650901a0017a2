"""Several servers over one root send the same bytes, also behind the nginx of docs/scaling.md."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
import urllib3
from support.build_queue import builds_document
from support.builds import build_document, record_toy, write_file
from support.fronts import NGINX, adapted, nginx
from support.pages import ROOT, blocks_of
from support.serving import (
    BUILD_TOKEN,
    KD_CACHE,
    READ_TOKEN,
    TOKENS,
    Serving,
    serving_process,
)
from support.sockets import free_port
from support.streams import train_config

from cache_service.api.http.catalog import COMMITS_TTL_S
from distill.reporting import read_metrics
from distill.trainer import train

LOAD_S = 3.0
"""What a busy machine may add to a time that the pages state."""

PATIENCE_S = 110.0
"""For a build to start and end."""


@pytest.fixture
def pair(tmp_path):
    """A root with one recorded seed, and two servers of it."""
    root = tmp_path / "root"
    record_toy(str(root / "c"), seeds="0:1")
    with (
        serving_process(root, log=tmp_path / "one.log") as one,
        serving_process(root, log=tmp_path / "two.log") as two,
    ):
        yield root, (one, two)


def test_both_servers_show_what_a_build_adds_within_a_second_and_as_the_same_bytes(pair, tmp_path):
    root, servers = pair
    file = write_file(tmp_path / "build.yaml", build_document(str(root / "c"), seeds="0:6"))
    command = [sys.executable, "-c", KD_CACHE, "build", str(file)]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as build,
        ThreadPoolExecutor(4) as pool,
    ):
        rows = [
            pool.submit(until_200, each, "rows?seed=5&start=64&stop=96&wait=5") for each in servers
        ]
        whole = [pool.submit(until_complete, each, 6) for each in servers]
        answers, complete_s = [each.result() for each in rows], [each.result() for each in whole]
        assert build.wait(PATIENCE_S) == 0
    committed_s = [path.stat().st_mtime for path in root.glob("c/commits/5/*.json")]
    assert len(committed_s) == 3
    for seen_s, answer in answers:
        assert seen_s - max(committed_s) < 1 + LOAD_S
        for name in ("etag", "kd-cache-crc32c"):
            assert answer.headers[name] == answers[0][1].headers[name]
        assert answer.data == answers[0][1].data
    assert max(complete_s) - max(committed_s) < COMMITS_TTL_S + LOAD_S
    one, two = (each.ask("GET", "/v1/caches/c") for each in servers)
    assert one.json()["fingerprint"] == two.json()["fingerprint"]
    assert (one.data, one.headers["etag"]) == (two.data, two.headers["etag"])
    for seed in range(6):
        path = f"/v1/caches/c/rows?seed={seed}&start=0&stop=96"
        one, two = (each.ask("GET", path) for each in servers)
        assert (one.status, one.data) == (200, two.data)


def until_200(server: Serving, path: str) -> tuple[float, urllib3.BaseHTTPResponse]:
    """When rows were answered first, Unix time, and the response. The seed may be unknown yet."""
    until = time.monotonic() + PATIENCE_S
    while (answer := server.ask("GET", f"/v1/caches/c/{path}")).status != 200:
        assert answer.status in (404, 503), answer.data
        assert time.monotonic() < until
        time.sleep(0.05)
    return time.time(), answer


def until_complete(server: Serving, num_seeds: int) -> float:
    """When a server listed all shards of so many seeds, Unix time."""
    until = time.monotonic() + PATIENCE_S
    while True:
        answer = server.ask("GET", "/v1/caches/c")
        assert answer.status == 200, answer.data
        if sum(map(len, answer.json()["commits"].values())) == 3 * num_seeds:
            return time.time()
        assert time.monotonic() < until
        time.sleep(0.05)


def test_two_workers_of_uvicorn_on_one_port_send_the_same_bytes_while_a_build_adds_to_them(
    tmp_path,
):
    root, port = tmp_path / "root", free_port()
    record_toy(str(root / "c"), seeds="0:1")
    file = write_file(tmp_path / "build.yaml", build_document(str(root / "c"), seeds="0:2"))
    serve = ["-m", "uvicorn", "--factory", "support.uvicorn_app:make_app", "--workers", "2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {
        "KD_CACHE_ROOT": str(root),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    }
    with (
        subprocess.Popen(
            [sys.executable, *serve, "--port", str(port)], env=environment, **quiet
        ) as workers,
        subprocess.Popen([sys.executable, "-c", KD_CACHE, "build", str(file)], **quiet) as build,
    ):
        server = Serving(f"http://127.0.0.1:{port}")
        try:
            wait_for_port(port)
            while build.poll() is None:
                answer = server.ask("GET", "/v1/caches/c/rows?seed=1&start=0&stop=32")
                assert answer.status in (200, 404, 503), answer.data
                time.sleep(0.05)
            assert build.returncode == 0
            time.sleep(COMMITS_TTL_S)
            found = rows_by_process(server)
        finally:
            workers.terminate()
    assert len(set(found.values())) == 1


def wait_for_port(port):
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise AssertionError("nothing listens")


def rows_by_process(server):
    """The last seed's rows and their ETag, from each of two processes."""
    found, until = {}, time.monotonic() + PATIENCE_S
    while len(found) < 2 and time.monotonic() < until:
        rows = server.ask("GET", "/v1/caches/c/rows?seed=1&start=0&stop=96")
        assert rows.status == 200, rows.data
        found[rows.headers["x-process"]] = (rows.data, rows.headers["etag"])
    assert len(found) == 2
    return found


class Behind(NamedTuple):
    """nginx with the page's configuration, the servers behind it, and their logs."""

    url: str
    first: Serving
    second: Serving
    logs: tuple

    def ask(self, path, token=READ_TOKEN, method="GET"):
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        return urllib3.request(method, self.url + path, headers=headers, retries=False)

    def num_row_requests(self):
        """Requests for rows that were answered, by server."""
        return [log.read_text().count('"/v1/caches/{name}/rows"') for log in self.logs]


@pytest.fixture(scope="module")
def behind(tmp_path_factory):
    if NGINX is None:
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("replicas")
    root = folder / "root"
    record_toy(str(root / "c"))
    logs = folder / "first.log", folder / "second.log"
    block = next(b for b in blocks_of(ROOT / "docs" / "scaling.md") if b.language == "nginx")
    with (
        serving_process(root, log=logs[0], tokens=TOKENS, builds=builds_document()) as first,
        serving_process(root, log=logs[1], tokens=TOKENS) as second,
    ):
        port = free_port()
        changes = {
            "/var/cache/nginx/kd-cache": str(folder / "kept"),
            "kdc_...": READ_TOKEN,
            "listen 8000;": f"listen 127.0.0.1:{port};",
            "server 192.0.2.7:8000;  # with `builds`": f"server {place(first)};",
            "server 192.0.2.7:8000 max": f"server {place(first)} max",
            "server 192.0.2.8:8000 max": f"server {place(second)} max",
        }
        with nginx(folder, adapted(block.text, changes), port):
            yield Behind(f"http://127.0.0.1:{port}", first, second, logs)


def place(server: Serving) -> str:
    return server.url.removeprefix("http://")


def test_rows_are_kept_for_those_whose_token_nginx_knows_and_for_nobody_else(behind):
    fingerprint = behind.ask("/v1/caches/c").json()["fingerprint"]
    path = f"/v1/caches/c/rows?seed=0&start=3&stop=8&fingerprint={fingerprint}"
    first, again = behind.ask(path), behind.ask(path)
    assert [each.headers["x-cache"] for each in (first, again)] == ["MISS", "HIT"]
    assert (again.status, again.data) == (200, first.data)
    for token in (None, "kdc_wrong"):
        assert behind.ask(path, token).status == 401
    other = behind.ask(path, BUILD_TOKEN)  # known to the servers only
    assert (other.status, other.headers["x-cache"], other.data) == (200, "BYPASS", first.data)
    without = [behind.ask("/v1/caches/c/rows?seed=0&start=3&stop=8") for _ in range(2)]
    assert [each.headers["x-cache"] for each in without] == ["BYPASS"] * 2


def test_builds_go_to_the_server_that_has_them(behind):
    for _ in range(6):
        assert behind.ask("/v1/builds").json() == {"builds": [], "out_of_space": None}
    statuses = {server.ask("GET", "/v1/builds", token=READ_TOKEN).status for server in behind[1:3]}
    assert statuses == {200, 404}


def test_a_student_goes_on_when_a_server_dies_and_a_second_one_asks_no_server_for_rows(
    behind, tmp_path, monkeypatch
):
    monkeypatch.setenv("KD_CACHE_TOKEN", READ_TOKEN)
    local = behind.logs[0].parent / "root" / "c"
    remote = f"{behind.url}/v1/caches/c"
    before = behind.num_row_requests()

    def kill_after_its_first_rows():
        until = time.monotonic() + PATIENCE_S
        while behind.num_row_requests()[1] == before[1] and time.monotonic() < until:
            time.sleep(0.002)
        behind.second.process.kill()

    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_after_its_first_rows)
        train(config_for(tmp_path / "first", remote))
        killing.result()
    assert behind.second.process.wait(10) < 0
    asked = behind.num_row_requests()
    assert all(after > earlier for after, earlier in zip(asked, before, strict=True))
    train(config_for(tmp_path / "second", remote))
    assert behind.num_row_requests() == asked
    train(config_for(tmp_path / "local", str(local)))
    wanted = losses(tmp_path / "local")
    assert losses(tmp_path / "first") == wanted
    assert losses(tmp_path / "second") == wanted


def config_for(out, cache):
    settings = {
        "dataset": {"name": "support.toys:patches", "args": {"num_samples": 96}},
        "caches": cache,
        "student": {"model": "support.streams:normed_net"},
        "method": {"name": "sd-kd"},
        "batch_size": 20,
        "epochs": 3,
    }
    return train_config(out, **settings)


def losses(out):
    return [line["loss"] for line in read_metrics(str(out)) if line["kind"] == "step"]
