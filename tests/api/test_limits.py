"""A full house says so at once; health and metrics always get through; nothing stays behind."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.caches import make_spec, write_cache
from support.serving import serving, serving_process
from support.sockets import connect, get, metric, probing
from support.toyservice import toy_service

from cache_service.api.http.limits import ConcurrencyLimiter
from cache_service.api.http.settings import ServiceLimits


@pytest.mark.parametrize(
    ("clients", "seconds"), [(60, 0.05), pytest.param(200, 0.25, marks=pytest.mark.faults)]
)
def test_slow_lookups_do_not_slow_health_and_the_excess_is_told_to_wait(tmp_path, clients, seconds):
    with toy_service(tmp_path, in_flight=32, threads=4) as toy, probing(toy.port) as probe:
        with ThreadPoolExecutor(clients) as pool:
            answers = [
                pool.submit(get, toy.port, f"/v1/lookup/a?seconds={seconds}")
                for _ in range(clients)
            ]
            time.sleep(seconds / 2)
            begun = time.monotonic()
            assert metric(toy.port, "kdcache_inflight_requests") <= 32
            assert time.monotonic() - begun < 0.5
            found = [answer.result() for answer in answers]
        statuses = [status for status, _, _ in found]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 32
        for status, headers, body in found:
            if status == 503:
                assert headers["retry-after"] == "1"
                assert headers["content-type"] == "application/problem+json"
                assert json.loads(body)["code"] == "busy"
        assert probe.failures == []
        assert sorted(probe.seconds)[int(len(probe.seconds) * 0.99)] < 0.25
        assert metric(toy.port, "kdcache_inflight_requests") == 0
        assert metric(toy.port, "kdcache_reading_threads") == 0


def test_the_caps_hold_under_64_clients(tmp_path):
    with toy_service(tmp_path, in_flight=10, threads=2) as toy:
        largest, ended = [], threading.Event()

        def watch():
            while not ended.is_set():
                largest.append(
                    (
                        metric(toy.port, "kdcache_inflight_requests"),
                        metric(toy.port, "kdcache_reading_threads"),
                    )
                )

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(64) as pool:
            calls = [pool.submit(get, toy.port, "/v1/lookup/a?seconds=0.02") for _ in range(256)]
            statuses = [call.result()[0] for call in calls]
        ended.set()
        watcher.join()
    assert set(statuses) == {200, 503}
    assert max(in_flight for in_flight, _ in largest) == 10
    assert max(threads for _, threads in largest) == 2


def settles(condition, seconds=5.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("clients", [30, pytest.param(200, marks=pytest.mark.faults)])
def test_clients_that_leave_while_reading_leave_nothing_behind(tmp_path, clients):
    with toy_service(tmp_path, in_flight=250, threads=4) as toy:
        get(toy.port, "/healthz")
        files = toy.num_files()
        sockets = [connect(toy.port) for _ in range(clients)]
        for each in sockets:
            each.sendall(b"GET /v1/lookup/a?seconds=0.3 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert settles(lambda: metric(toy.port, "kdcache_reading_threads") == 4)
        for each in sockets:
            each.close()
        # Reading for all of them would take 0.3 s * clients / 4; the ones that left are not read.
        assert settles(lambda: metric(toy.port, "kdcache_inflight_requests") == 0, 2.0)
        assert metric(toy.port, "kdcache_reading_threads") == 0
        assert settles(lambda: toy.num_files() <= files)
        left = 'kdcache_requests_total{code="499",route="/v1/lookup/{name}"}'
        assert metric(toy.port, left) >= clients - 8


def test_event_streams_have_places_of_their_own(tmp_path):
    with toy_service(tmp_path, streams=2, in_flight=2) as toy:
        streams = [connect(toy.port) for _ in range(2)]
        for each in streams:
            each.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
            assert each.recv(4096).startswith(b"HTTP/1.1 200")
        assert get(toy.port, "/v1/events")[0] == 503
        assert get(toy.port, "/v1/lookup/a")[0] == 200
        assert metric(toy.port, "kdcache_event_streams") == 2
        for each in streams:
            each.close()
        assert settles(lambda: metric(toy.port, "kdcache_event_streams") == 0)


def test_a_gate_counts_in_and_out():
    limiter = ConcurrencyLimiter(ServiceLimits(max_inflight=1, max_streams=1, threads=1))
    assert limiter.enter(stream=False)
    assert not limiter.enter(stream=False)
    assert limiter.enter(stream=True)
    assert not limiter.enter(stream=True)
    limiter.leave(stream=False)
    limiter.leave(stream=True)
    assert (limiter.in_flight, limiter.event_streams) == (0, 0)
    assert limiter.enter(stream=False)


def test_answers_that_slow_clients_do_not_take_are_bounded_in_bytes(tmp_path):
    size = 8 << 20  # more than the buffers of both kernels take
    with toy_service(tmp_path, held_bytes=20 << 20) as toy:
        get(toy.port, "/healthz")
        before = toy.rss()
        slow = []
        for _ in range(12):
            opened = socket.socket()
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            opened.connect(("127.0.0.1", toy.port))
            opened.sendall(b"GET /v1/lookup/a?size=%d HTTP/1.1\r\nHost: x\r\n\r\n" % size)
            slow.append(opened)
        heads = [each.recv(200).split(b"\r\n")[0] for each in slow]
        assert (
            sorted(heads) == [b"HTTP/1.1 200 OK"] * 2 + [b"HTTP/1.1 503 Service Unavailable"] * 10
        )
        assert metric(toy.port, "kdcache_held_answer_bytes") == 2 * size
        assert metric(toy.port, "kdcache_inflight_requests") == 2
        assert settles(lambda: toy.rss() - before < 64 << 20)  # two answers, none of the refused
        status, headers, body = get(toy.port, f"/v1/lookup/a?size={size}")
        assert (status, headers["retry-after"], json.loads(body)["code"]) == (503, "1", "busy")
        assert get(toy.port, "/v1/lookup/a?size=60000")[0] == 200  # small ones pass
        for each in slow:
            each.close()
        assert settles(lambda: metric(toy.port, "kdcache_held_answer_bytes") == 0)
        assert len(get(toy.port, f"/v1/lookup/a?size={size}")[2]) == size


def test_one_answer_larger_than_the_bound_is_let_through_alone(tmp_path):
    with toy_service(tmp_path, held_bytes=1 << 20) as toy:
        for _ in range(2):
            status, _, body = get(toy.port, f"/v1/lookup/a?size={5 << 20}")
            assert (status, len(body)) == (200, 5 << 20)


def test_slow_clients_of_the_real_service_hold_no_more_than_allowed(tmp_path):
    write_cache(str(tmp_path / "root" / "toy"), make_spec(num_classes=20), range(1))
    samples = (np.arange(12_500, dtype="<i4") % 100).tobytes()  # 8 MB of rows
    with serving(tmp_path / "root", limits=ServiceLimits(max_answer_bytes=20 << 20)) as server:
        port = int(server.url.rpartition(":")[2])
        slow = []
        for _ in range(6):
            opened = socket.socket()
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            opened.connect(("127.0.0.1", port))
            opened.sendall(
                b"POST /v1/caches/toy/lookup?seed=0 HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Type: application/octet-stream\r\nContent-Length: 50000\r\n\r\n"
            )
            opened.sendall(samples)
            slow.append(opened)
        heads = [each.recv(200).split(b"\r\n")[0] for each in slow]
        assert sorted(heads) == [b"HTTP/1.1 200 OK"] * 2 + [b"HTTP/1.1 503 Service Unavailable"] * 4
        held = metric(port, "kdcache_held_answer_bytes")
        assert 16_000_000 < held <= 20 << 20
        for each in slow:
            each.close()
        assert settles(lambda: metric(port, "kdcache_held_answer_bytes") == 0)


def test_ranges_out_of_the_maps_take_no_memory_however_slowly_they_are_read(tmp_path):
    spec = make_spec(num_classes=20, num_samples=12_500, shard_rows=8192, chunk_rows=1024)
    write_cache(str(tmp_path / "root" / "toy"), spec, range(1))
    limits = {"max_answer_bytes": 20 << 20}
    path = "/v1/caches/toy/rows?seed=0&start=0&stop=12500"
    with serving_process(tmp_path / "root", log=tmp_path / "log", limits=limits) as server:
        port = int(server.url.rpartition(":")[2])
        size = len(get(port, path)[2])
        assert size > 8_000_000
        get(port, path)  # out of the maps, now that every chunk is checked
        before = anonymous_bytes(server.process.pid)
        slow = []
        for _ in range(12):
            opened = socket.socket()
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            opened.connect(("127.0.0.1", port))
            opened.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            slow.append(opened)
        heads = [each.recv(200).split(b"\r\n")[0] for each in slow]
        assert heads == [b"HTTP/1.1 200 OK"] * 12
        held = metric(port, "kdcache_held_answer_bytes")
        assert 0 < held < size  # what had to be joined; all answers together are 12 times the size
        assert anonymous_bytes(server.process.pid) - before < held + (4 << 20)
        for each in slow:
            each.close()


def anonymous_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])
