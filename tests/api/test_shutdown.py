"""SIGTERM: what is being answered is answered, nobody new gets in, and the process is gone soon."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.sockets import connect, get, metric, receive_all
from support.toyservice import toy_service


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
        with pytest.raises(ConnectionRefusedError):
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
