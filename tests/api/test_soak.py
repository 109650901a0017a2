"""Uptime costs nothing: after many lookups and streams, memory and files are where they were."""

from __future__ import annotations

import http.client
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from support.caches import make_spec, write_cache
from support.serving import serving_process
from support.sockets import connect, metric

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
        memory, files = process.memory_info().rss, num_files(process)
        list(pool.map(look_up, [port] * 2, [lookups // 2] * 2))
        assert process.memory_info().rss - memory < 5 * MEBIBYTE
        assert metric(port, "kdcache_inflight_requests") == 0
        assert num_files(process) == files


@pytest.mark.parametrize("streams", [30, pytest.param(200, marks=pytest.mark.faults)])
def test_streams_that_come_and_go_leave_nothing_behind(tmp_path, streams):
    write_cache(str(tmp_path / "root" / "toy"), make_spec())
    with serving_process(tmp_path / "root", log=tmp_path / "log.txt") as server:
        port, process = int(server.url.rpartition(":")[2]), psutil.Process(server.process.pid)
        watch_and_leave(port, 10)  # warm, as above
        assert settles(lambda: metric(port, "kdcache_event_streams") == 0)
        memory, files = process.memory_info().rss, num_files(process)
        watch_and_leave(port, streams)
        # A stream ends when the server sees that its client is gone.
        assert settles(lambda: metric(port, "kdcache_event_streams") == 0)
        assert process.memory_info().rss - memory < 5 * MEBIBYTE
        assert num_files(process) == files


def watch_and_leave(port, times):
    for _ in range(times):
        with connect(port) as opened:
            opened.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert opened.recv(4096).startswith(b"HTTP/1.1 200")


def settles(true, server_wait_s=10.0):
    until = time.monotonic() + server_wait_s
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def num_files(process):
    """Open files when no connection is left: the last one counts until its end has been read."""
    assert settles(lambda: all(each.status == "LISTEN" for each in process.net_connections()))
    return process.num_fds()
