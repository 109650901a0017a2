"""Requests have a deadline and a size, connections a number, and health is never slowed down."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest
from support.sockets import Closings, connect, get, metric, probing, receive_all, receive_one
from support.toyservice import toy_service

HEADER_SECONDS = 0.6
"""Short, so that the ordinary tests wait little."""

MEBIBYTE = 2**20


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("connections")
    with toy_service(
        folder, header_seconds=HEADER_SECONDS, send_seconds=0.5, keep_alive=1
    ) as running:
        yield running


def problem_of(answer):
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), json.loads(body)


def timed_answer(opened):
    begun = time.monotonic()
    return receive_all(opened), time.monotonic() - begun


def test_half_a_header_is_answered_408_at_the_deadline(toy):
    with connect(toy.port) as opened:
        opened.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        answer, seconds = timed_answer(opened)
    line, problem = problem_of(answer)
    assert line == "HTTP/1.1 408 Request Timeout"
    assert (problem["status"], problem["code"]) == (408, "request_timeout")
    assert problem["hint"]
    assert HEADER_SECONDS - 0.1 <= seconds <= HEADER_SECONDS + 1


def test_a_silent_connection_is_closed_without_a_word(toy):
    with connect(toy.port) as opened:
        answer, seconds = timed_answer(opened)
    assert answer == b""
    assert seconds <= HEADER_SECONDS + 1


def test_empty_lines_on_a_kept_connection_do_not_hold_it(toy):
    with connect(toy.port) as opened:
        opened.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert receive_one(opened).startswith(b"HTTP/1.1 200")
        opened.sendall(b"\r\n")
        _, seconds = timed_answer(opened)
    assert seconds <= HEADER_SECONDS + 1


def test_the_next_request_of_a_kept_connection_has_a_deadline_of_its_own(toy):
    with connect(toy.port) as opened:
        for _ in range(3):
            opened.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert receive_one(opened).startswith(b"HTTP/1.1 200")
            time.sleep(HEADER_SECONDS / 2)
        opened.sendall(b"GET /healthz HTTP/1.1\r\n")
        answer, seconds = timed_answer(opened)
    assert answer.startswith(b"HTTP/1.1 408")
    assert seconds >= HEADER_SECONDS - 0.1


def test_a_slow_handler_has_no_deadline(toy):
    begun = time.monotonic()
    assert get(toy.port, "/v1/lookup/a?seconds=1.2")[0] == 200
    assert time.monotonic() - begun >= 1.2


def test_a_body_of_a_byte_at_a_time_is_cut_off(toy):
    with connect(toy.port) as opened:
        opened.sendall(b"POST /v1/body HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        begun = time.monotonic()
        opened.settimeout(0.1)
        answer = b""
        while not answer:
            assert time.monotonic() - begun < HEADER_SECONDS + 1
            opened.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = opened.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_body_that_is_slow_but_moves_arrives(toy):
    size = 60_000
    with connect(toy.port) as opened:
        opened.sendall(b"POST /v1/body HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        for _ in range(6):
            opened.sendall(b"x" * (size // 6))
            time.sleep(0.25)  # 1.5 s, over twice the deadline of a header
        assert receive_one(opened).startswith(b"HTTP/1.1 200")


def test_a_header_over_the_limit_is_answered_431(toy):
    with connect(toy.port) as opened:
        opened.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 33_000 + b"\r\n\r\n")
        line, problem = problem_of(receive_all(opened))
    assert line == "HTTP/1.1 431 Request Header Fields Too Large"
    assert problem["code"] == "header_too_large"


def test_an_address_over_the_limit_is_answered_431(toy):
    with connect(toy.port) as opened:
        opened.sendall(b"GET /" + b"a" * 33_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        assert receive_all(opened).startswith(b"HTTP/1.1 431")


def test_a_header_just_under_the_limit_is_taken(toy):
    assert get(toy.port, "/healthz", x="a" * 32_000)[0] == 200


def test_trailers_are_bounded_too(toy):
    too_large = 'kdcache_refused_connections_total{reason="header_too_large"}'
    before = metric(toy.port, too_large)
    with connect(toy.port) as opened:
        opened.sendall(
            b"POST /v1/body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\nx\r\n0\r\nT: "
        )
        answer = b""
        with contextlib.suppress(ConnectionError):
            for _ in range(20):
                opened.sendall(b"a" * 10_000)
                time.sleep(0.01)
        answer = receive_all(opened)
    assert not answer.startswith(b"HTTP/1.1 200")
    assert metric(toy.port, too_large) == before + 1


def test_trailers_do_not_become_headers(toy):
    with connect(toy.port) as opened:
        opened.sendall(
            b"POST /v1/body HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b"1\r\nx\r\n0\r\nX-Request-Id: smuggled\r\n\r\n"
        )
        answer = receive_one(opened)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"smuggled" not in answer


@pytest.mark.parametrize("first", [b"/v1/lookup/a?seconds=0.3", b"/v1/lookup/a?size=9000000"])
def test_a_refusal_is_never_written_into_the_response_before_it(toy, first):
    with connect(toy.port) as opened:
        opened.sendall(b"GET " + first + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        opened.sendall(b"NONSENSE\r\n\r\n")
        assert b"400" not in receive_all(opened)


@pytest.mark.parametrize(
    "request_line",
    [b"NONSENSE\r\n\r\n", b"GET http://[ HTTP/1.1\r\n\r\n", b"CONNECT x:1 HTTP/1.1\r\n\r\n"],
)
def test_what_is_not_http_is_answered_400(toy, request_line):
    with connect(toy.port) as opened:
        opened.sendall(request_line)
        line, problem = problem_of(receive_all(opened))
    assert line == "HTTP/1.1 400 Bad Request"
    assert problem["code"] == "bad_request"


def test_an_answer_that_nobody_takes_is_given_up(toy):
    before = metric(toy.port, 'kdcache_refused_connections_total{reason="stalled"}')
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    opened.connect(("127.0.0.1", toy.port))
    with opened:
        opened.sendall(b"GET /v1/lookup/a?size=30000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(1.6)
        stalled = metric(toy.port, 'kdcache_refused_connections_total{reason="stalled"}')
    assert stalled == before + 1


def test_a_few_requests_sent_ahead_are_answered_in_order(toy):
    wanted = [b"x" * n for n in (1, 2, 3)]
    with connect(toy.port) as opened:
        for body in wanted:
            opened.sendall(b"GET /v1/lookup/a?size=%d HTTP/1.1\r\nHost: x\r\n\r\n" % len(body))
        received = receive_all(opened)
    answers = [part.partition(b"\r\n\r\n")[2] for part in received.split(b"HTTP/1.1 200 OK")[1:]]
    assert answers == wanted


def test_a_connection_above_the_limit_is_refused_and_the_others_are_served(tmp_path):
    with toy_service(tmp_path, connections=3) as toy:
        working = [connect(toy.port) for _ in range(3)]
        for each in working:
            each.sendall(b"GET /v1/lookup/a?seconds=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.3)
        with connect(toy.port) as opened:
            line, problem = problem_of(receive_all(opened))
        assert line == "HTTP/1.1 503 Service Unavailable"
        assert (problem["code"], problem["detail"]) == (
            "busy",
            "Every connection slot is in use.",
        )
        for each in working:
            assert receive_one(each).startswith(b"HTTP/1.1 200")
            each.close()
        assert get(toy.port, "/healthz")[0] == 200


def test_silent_connections_free_their_slots_at_the_deadline(tmp_path):
    with toy_service(tmp_path, connections=20, header_seconds=0.5) as toy:
        silent = [connect(toy.port) for _ in range(20)]
        closings = Closings(silent, time.monotonic())
        closings.wait(1.5)
        assert not closings.open
        assert get(toy.port, "/healthz")[0] == 200


def besiege(port, half_open, silent, dripping, watch_seconds):
    """Attack; when each socket was closed."""
    begun = time.monotonic()
    sockets = [connect(port) for _ in range(half_open + silent + dripping)]
    for each in sockets[:half_open]:
        each.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Half: ")
    drips = sockets[half_open + silent :]
    for each in drips:
        each.sendall(b"POST /v1/body HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
    closings = Closings(sockets, begun)
    for _ in range(watch_seconds):
        for each in drips:
            with contextlib.suppress(OSError):
                each.sendall(b"x")
        closings.wait(1.0)
    return closings


@pytest.mark.parametrize(
    ("half_open", "silent", "dripping", "header_seconds"),
    [
        (60, 12, 6, 1.0),
        pytest.param(500, 100, 50, 5.0, marks=pytest.mark.faults),
    ],
)
def test_slow_senders_are_closed_in_time_and_health_does_not_notice(
    tmp_path, half_open, silent, dripping, header_seconds
):
    with toy_service(tmp_path, header_seconds=header_seconds) as toy:
        get(toy.port, "/healthz")
        before = toy.rss()
        with probing(toy.port) as probe:
            closings = besiege(toy.port, half_open, silent, dripping, int(header_seconds) + 2)
            grown = toy.rss() - before
        assert not closings.open
        assert len(closings.seconds) == half_open + silent + dripping
        connecting = 0.5  # the last sockets of the attack are not opened at its first instant
        assert max(closings.seconds) <= header_seconds + 1 + connecting
        assert probe.failures == []
        assert max(probe.seconds) < 0.5
        assert grown < 50 * MEBIBYTE


# The kernels' buffers on both sides take a few MiB, whatever the server reads.
@pytest.mark.parametrize("mebibytes", [32, pytest.param(200, marks=pytest.mark.faults)])
def test_a_huge_header_costs_next_to_nothing(tmp_path, mebibytes):
    with toy_service(tmp_path) as toy:
        get(toy.port, "/healthz")
        before = toy.rss()
        sent = 0
        with connect(toy.port) as opened, contextlib.suppress(ConnectionError):
            opened.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
            while sent < mebibytes * MEBIBYTE:
                sent += opened.send(b"a" * MEBIBYTE)
        assert sent < mebibytes * MEBIBYTE
        assert toy.rss() - before < 20 * MEBIBYTE
        assert get(toy.port, "/healthz")[0] == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_answered_413_and_costs_next_to_nothing(toy, chunked):
    before = toy.rss()
    piece = b"x" * 100_000
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 50000000"
    with connect(toy.port) as opened:
        opened.sendall(b"POST /v1/body HTTP/1.1\r\nHost: x\r\n" + framing + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            for _ in range(30):
                opened.sendall(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        answer = opened.recv(4096)
    assert answer.startswith(b"HTTP/1.1 413")
    assert toy.rss() - before < 20 * MEBIBYTE
