"""Uptime costs nothing: after many lookups and streams, memory and files are where they were."""

from __future__ import annotations

import http.client
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from support.caches import make_spec, write_cache
from support.serving import serving_process
from support.sockets import connect, get, metric
from support.toyservice import toy_service

MEBIBYTE = 2**20


def look_up(port, times):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    rng = np.random.default_rng(times)
    for _ in range(times):
        samples = rng.integers(0, 100, 16).astype("<i4").tobytes()
        headers = {"Content-Type": "application/octet-stream"}
        connection.request("POST", "/v1/caches/toy/lookup?seed=0", samples, headers)
        answer = connection.getresponse()
        assert answer.status == 200
        assert len(answer.read()) > 16 * 20
    connection.close()


@pytest.mark.parametrize("lookups", [600, pytest.param(20_000, marks=pytest.mark.faults)])
def test_lookups_leave_neither_memory_nor_files_behind(tmp_path, lookups):
    write_cache(str(tmp_path / "root" / "toy"), make_spec())
    with (
        serving_process(tmp_path / "root", log=tmp_path / "log.txt") as server,
        ThreadPoolExecutor(2) as pool,
    ):
        port, process = int(server.url.rpartition(":")[2]), psutil.Process(server.process.pid)
        list(pool.map(look_up, [port] * 2, [300] * 2))  # warm: threads, caches of libraries
        memory, files = process.memory_info().rss, process.num_fds()
        list(pool.map(look_up, [port] * 2, [lookups // 2] * 2))
        assert process.memory_info().rss - memory < 5 * MEBIBYTE
        assert metric(port, "kdcache_inflight_requests") == 0
        assert process.num_fds() <= files + 1  # the connection just closed may still count


@pytest.mark.parametrize("streams", [30, pytest.param(200, marks=pytest.mark.faults)])
def test_streams_that_come_and_go_leave_nothing_behind(tmp_path, streams):
    with toy_service(tmp_path) as toy:
        get(toy.port, "/healthz")
        files = toy.num_files()
        for _ in range(streams):
            with connect(toy.port) as opened:
                opened.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
                assert opened.recv(4096).startswith(b"HTTP/1.1 200")
        while metric(toy.port, "kdcache_event_streams"):
            pass  # a stream ends when the server sees that its client is gone
        assert toy.num_files() <= files + 1  # as above
