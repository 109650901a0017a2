"""SIGTERM: what is being answered is answered, nobody new gets in, and the process is gone soon."""

from __future__ import annotations

import json
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from support.build_queue import builds_document, request_document
from support.caches import make_spec, open_writer, write_cache
from support.serving import serving_process
from support.sockets import connect, get, metric, receive_all
from support.toyservice import toy_service

from cache_service.format.frame import checksum_of


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_is_in_flight_ends_streams_and_refuses_the_rest(tmp_path, number):
    with toy_service(tmp_path, threads=20) as toy, ThreadPoolExecutor(20) as pool:
        streams = [connect(toy.port) for _ in range(2)]
        for each in streams:
            each.sendall(b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n")
        idle = connect(toy.port)
        lookups = [pool.submit(get, toy.port, "/v1/lookup/a?seconds=1&size=50") for _ in range(20)]
        while metric(toy.port, "kdcache_inflight_requests") < 20:
            time.sleep(0.02)
        toy.process.send_signal(number)
        begun = time.monotonic()
        time.sleep(0.4)
        with pytest.raises(ConnectionRefusedError, match="refused"):
            connect(toy.port)
        answers = [lookup.result() for lookup in lookups]
        assert [(status, len(body)) for status, _, body in answers] == [(200, 50)] * 20
        for each in streams:
            assert receive_all(each).endswith(b"0\r\n\r\n")  # a whole response, not a cut one
            each.close()
        assert receive_all(idle) == b""
        idle.close()
        assert toy.process.wait(10) == 0
        assert time.monotonic() - begun < 5
        assert "lifespan ended" in toy.logged()


@pytest.mark.parametrize("stop", [1, pytest.param(4, marks=pytest.mark.faults)])
def test_what_takes_too_long_does_not_hold_the_stop(tmp_path, stop):
    with toy_service(tmp_path, stop=stop) as toy, ThreadPoolExecutor(1) as pool:
        pool.submit(get, toy.port, "/v1/lookup/a?seconds=30")
        while metric(toy.port, "kdcache_inflight_requests") < 1:
            time.sleep(0.02)
        begun = time.monotonic()
        toy.process.terminate()
        assert toy.process.wait(10) == 0
        assert stop <= time.monotonic() - begun < stop + 1


def test_a_second_signal_stops_at_once(tmp_path):
    with toy_service(tmp_path) as toy, ThreadPoolExecutor(1) as pool:
        pool.submit(get, toy.port, "/v1/lookup/a?seconds=30")
        while metric(toy.port, "kdcache_inflight_requests") < 1:
            time.sleep(0.02)
        begun = time.monotonic()
        toy.process.terminate()
        time.sleep(0.3)
        toy.process.terminate()
        assert toy.process.wait(10) == 0
        assert time.monotonic() - begun < 2


def lookup_slowly(port):
    """A connection whose lookup is answered with 8 MB, of which it has taken 200 bytes."""
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.settimeout(20)
    opened.connect(("127.0.0.1", port))
    samples = np.arange(12_500, dtype="<i4") % 100
    opened.sendall(
        b"POST /v1/caches/toy/lookup?seed=0 HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/octet-stream\r\n"
        b"Content-Length: %d\r\n\r\n" % samples.nbytes
    )
    opened.sendall(samples.tobytes())
    return opened, opened.recv(200)


def stream(port, path):
    opened = connect(port)
    opened.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return opened, opened.recv(65536)


def take(opened, begun):
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    pieces = [begun]
    while piece := opened.recv(1 << 20):
        pieces.append(piece)
    head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
    opened.close()
    told = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert head.startswith(b"HTTP/1.1 200")
    assert len(body) == int(told[b"content-length"])
    return checksum_of(body) == told[b"kd-cache-crc32c"].decode()


def test_the_real_service_ends_whatever_is_open_within_five_seconds(tmp_path):
    """10 lookups being taken, 10 awaiting their rows, two kinds of event streams, a build."""
    folder = tmp_path / "root"
    writer = write_cache(str(folder / "toy"), make_spec(num_classes=20), range(1))
    open_writer(str(folder / "toy"), writer.spec, 2)  # a second seed, nothing of it recorded
    limits = {"max_answer_bytes": 1 << 30}
    settings = {"limits": limits, "builds": builds_document(batch_size=2)}
    log = tmp_path / "log.txt"
    with (
        serving_process(folder, log=log, **settings) as server,
        ThreadPoolExecutor(20) as pool,
    ):
        port = int(server.url.rpartition(":")[2])
        document = request_document(cache="built", seeds="0:50")
        build = server.ask("POST", "/v1/builds", json=document).json()["id"]
        streams = [stream(port, "/v1/events"), stream(port, f"/v1/builds/{build}/events")]
        awaited = "/v1/caches/toy/rows?seed=1&start=0&stop=8&wait=30"
        waiting = [pool.submit(get, port, awaited) for _ in range(10)]
        taken = [lookup_slowly(port) for _ in range(10)]
        while metric(port, "kdcache_inflight_requests") < 20:
            time.sleep(0.02)
        assert metric(port, "kdcache_event_streams") == 2
        server.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        time.sleep(0.3)
        with pytest.raises(ConnectionRefusedError, match="refused"):
            connect(port)
        assert all(pool.map(take, *zip(*taken, strict=True)))
        for status, headers, body in (each.result() for each in waiting):
            assert (status, json.loads(body)["code"]) == (503, "rows_not_built")
            assert int(headers["retry-after"]) >= 1
        for opened, first in streams:
            assert first.startswith(b"HTTP/1.1 200")
            assert receive_all(opened).endswith(b"0\r\n\r\n")  # a whole response, not a cut one
            opened.close()
        assert server.process.wait(10) == 0
        assert time.monotonic() - begun < 5
    assert "Traceback" not in log.read_text()


@pytest.mark.faults  # it waits for as long as a stop may take
def test_clients_that_take_nothing_do_not_hold_the_stop(tmp_path):
    write_cache(str(tmp_path / "root" / "toy"), make_spec(num_classes=20), range(1))
    log = tmp_path / "log.txt"
    with serving_process(tmp_path / "root", log=log) as server:
        port = int(server.url.rpartition(":")[2])
        held = [lookup_slowly(port)[0] for _ in range(3)]
        begun = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - begun < 5
        for each in held:
            each.close()
