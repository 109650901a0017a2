"""`kd-cache serve` as a process: where it listens, what it says, how it ends."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.caches import make_spec, open_writer, write_cache
from support.serving import KD_CACHE, serving, serving_process
from support.sockets import connect, get, metric

from cache_service.api.http.settings import ServiceLimits
from cache_service.api.server import allow_open_files, listen, url_of
from cache_service.errors import ConfigError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    write_cache(str(folder / "toy"), make_spec())
    return folder


def port_of(server):
    return int(server.url.rpartition(":")[2])


def test_port_0_is_announced_as_the_port_it_became(root):
    with serving(root) as server:
        assert port_of(server) > 0
        assert get(port_of(server), "/healthz")[0] == 200


def test_a_taken_port_is_refused_with_the_way_out(root):
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}") as refused:
            listen("127.0.0.1", port)
        assert "--port" in refused.value.hint
        ended = subprocess.run(
            [sys.executable, "-c", KD_CACHE, "serve", str(root), "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert ended.returncode == 2
    assert "error[config]" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_host_that_is_not_ours_is_refused():
    with pytest.raises(ConfigError, match="cannot listen on"):
        listen("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="cannot listen on"):
        listen("no-such-host.invalid", 0)


def test_ipv6_is_written_in_brackets():
    assert url_of("::1", 8000) == "http://[::1]:8000"
    assert url_of("127.0.0.1", 80) == "http://127.0.0.1:80"


def test_the_limit_of_open_files_is_only_ever_raised():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        allow_open_files(1)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(before[0], 513)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        allow_open_files(1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(1512, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_service_ends_with_status_0_and_answers_what_was_asked(root, tmp_path, number):
    with serving_process(root, log=tmp_path / "log.txt") as server:
        port = port_of(server)
        path = "/v1/caches/toy/rows?seed=0&start=0&stop=64"
        with ThreadPoolExecutor(20) as pool:
            calls = [pool.submit(get, port, path) for _ in range(20)]
            # Whatever began is answered whole; what came too late was refused, not cut off.
            server.process.send_signal(number)
            begun = time.monotonic()
            ended = [call.exception() or call.result()[0] for call in calls]
        assert server.process.wait(10) == 0
        assert time.monotonic() - begun < 5
    assert all(
        each == 200 or isinstance(each, ConnectionRefusedError | ConnectionResetError)
        for each in ended
    )
    assert "Traceback" not in (tmp_path / "log.txt").read_text()


def test_a_wait_for_rows_ends_when_the_service_stops(root, tmp_path):
    planned = "/v1/caches/half/rows?seed=1&start=0&stop=8&wait=30"
    folder = tmp_path / "root"
    writer = write_cache(str(folder / "half"), make_spec(), range(1))
    open_writer(str(folder / "half"), writer.spec, 2)  # a second seed, nothing of it recorded
    with serving_process(folder, log=tmp_path / "log.txt") as server:
        port = port_of(server)
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(get, port, planned)
            while metric(port, "kdcache_inflight_requests") < 1:
                time.sleep(0.02)
            begun = time.monotonic()
            server.process.terminate()
            assert call.result()[0] == 503
            assert server.process.wait(10) == 0
            assert time.monotonic() - begun < 5


def test_the_real_service_limits_its_connections(root):
    limits = ServiceLimits(header_timeout_s=0.4, max_header_bytes=2048)
    with serving(root, limits=limits) as server:
        port = port_of(server)
        with connect(port) as opened:
            opened.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 4000)
            assert opened.recv(4096).startswith(b"HTTP/1.1 431")
        with connect(port) as opened:
            opened.sendall(b"GET /healthz HTTP/1.1\r\n")
            assert opened.recv(4096).startswith(b"HTTP/1.1 408")
        assert metric(port, 'kdcache_refused_connections_total{reason="request_timeout"}') == 1


def test_the_real_service_counts_rows_bytes_and_errors(root):
    with serving(root) as server:
        port = port_of(server)
        body = get(port, "/v1/caches/toy/rows?seed=0&start=0&stop=32")[2]
        assert get(port, "/v1/caches/none/rows?seed=0&start=0&stop=32")[0] == 404
        route = "/v1/caches/{name}/rows"
        assert metric(port, f'kdcache_requests_total{{code="200",route="{route}"}}') == 1
        assert metric(port, f'kdcache_requests_total{{code="404",route="{route}"}}') == 1
        assert metric(port, "kdcache_rows_total") == 32
        assert metric(port, "kdcache_response_bytes_total") > len(body)


def test_nothing_is_sent_anywhere(root, monkeypatch):
    """Telemetry stays off, whatever the environment of the process asks for."""
    connected = []
    connect_before = socket.socket.connect

    def note(self, address):
        connected.append(address)
        return connect_before(self, address)

    monkeypatch.setattr(socket.socket, "connect", note)
    monkeypatch.setitem(os.environ, "FASTAPI_OTEL_AUTO_CONFIGURE", "true")
    monkeypatch.setitem(os.environ, "OTEL_EXPORTER_OTLP_ENDPOINT", "http://192.0.2.1:4318")
    with serving(root) as server:
        get(port_of(server), "/v1/caches")
    assert {address[0] for address in connected} <= {"127.0.0.1"}
