"""The nginx configuration of docs/serving.md: what it refuses, and what passes through it."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import ssl
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pytest
from support.caches import make_spec, open_writer, write_cache
from support.fronts import NGINX, adapted, nginx, self_signed
from support.pages import ROOT, blocks_of
from support.serving import serving
from support.sockets import free_port, metric, receive_all

pytestmark = pytest.mark.skipif(
    NGINX is None or shutil.which("openssl") is None, reason="nginx or openssl is not installed"
)

HEADER_S, SEND_S, CONNECTIONS = 1, 1, 32


class Proxied(NamedTuple):
    """A service on `port`, and nginx with TLS before it on `tls_port`."""

    port: int
    tls_port: int

    def connect(self, receive_bytes: int | None = None) -> ssl.SSLSocket:
        opened = socket.socket()
        if receive_bytes is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        opened.settimeout(20)
        opened.connect(("127.0.0.1", self.tls_port))
        return CONTEXT.wrap_socket(opened, server_hostname="localhost")

    def ask(self, method, path, body=None, *, through=True, **headers):
        if through:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.tls_port, context=CONTEXT, timeout=20
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Host": "localhost", **named})
            answer = connection.getresponse()
            lowered = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, lowered, answer.read()


CONTEXT = ssl.create_default_context()
CONTEXT.check_hostname = False
CONTEXT.verify_mode = ssl.CERT_NONE


@pytest.fixture(scope="module")
def proxied(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nginx")
    write_cache(str(folder / "root" / "toy"), make_spec(num_classes=40), range(1))
    spec = open_writer(str(folder / "root" / "half"), make_spec(), 2).spec
    assert spec.num_shards > 1
    self_signed(folder)
    block = next(b for b in blocks_of(ROOT / "docs" / "serving.md") if b.language == "nginx")
    with serving(folder / "root") as service:
        port, tls_port = int(service.url.rpartition(":")[2]), free_port()
        changes = {
            "server 127.0.0.1:8000;": f"server 127.0.0.1:{port};",
            "listen 443 ssl;": f"listen 127.0.0.1:{tls_port} ssl;",
            "/etc/ssl/certs/teacher.pem": str(folder / "cert.pem"),
            "/etc/ssl/private/teacher.key": str(folder / "key.pem"),
            "client_header_timeout 5s;": f"client_header_timeout {HEADER_S}s;",
            "client_body_timeout 5s;": f"client_body_timeout {HEADER_S}s;",
            "send_timeout 30s;": f"send_timeout {SEND_S}s;",
        }
        with nginx(folder, adapted(block.text, changes), tls_port):
            yield Proxied(port, tls_port)


def test_ranges_lookups_and_stored_objects_pass_unchanged(proxied):
    octets = {"Content_Type": "application/octet-stream"}
    samples = np.arange(50, dtype="<i4")[::-1].tobytes()
    for method, path, body, headers in (
        ("GET", "/v1/caches/toy/rows?seed=0&start=3&stop=90", None, {}),
        ("HEAD", "/v1/caches/toy/rows?seed=0&start=3&stop=90", None, {}),
        ("POST", "/v1/caches/toy/lookup?seed=0", samples, octets),
        ("GET", "/v1/caches/toy/zarr/logits/c/0/0/0/0", None, {"Range": "bytes=5-99"}),
        ("GET", "/v1/caches/toy", None, {}),
        ("GET", "/v1/caches/none", None, {}),
    ):
        direct = proxied.ask(method, path, body, through=False, **headers)
        status, named, content = proxied.ask(method, path, body, **headers)
        assert (status, content) == (direct[0], direct[2]), path
        for name in ("etag", "kd-cache-crc32c", "content-length", "content-type", "cache-control"):
            assert named.get(name) == direct[1].get(name), (path, name)


def test_a_known_range_is_answered_304(proxied):
    path = "/v1/caches/toy/rows?seed=0&start=0&stop=4"
    etag = proxied.ask("GET", path)[1]["etag"]
    status, _, content = proxied.ask("GET", path, If_None_Match=etag)
    assert (status, content) == (304, b"")


def test_a_large_response_passes_whole(proxied):
    samples = (np.arange(4_000, dtype="<i4") % 100).tobytes()
    headers = {"Content_Type": "application/octet-stream"}
    status, named, content = proxied.ask("POST", "/v1/caches/toy/lookup?seed=0", samples, **headers)
    assert status == 200
    assert len(content) == int(named["content-length"]) > 4 << 20


def test_events_are_passed_on_at_once(proxied):
    with proxied.connect() as opened:
        opened.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        begun, received = time.monotonic(), b""
        while received.count(b"data: ") < 2:
            received += opened.recv(4096)
    assert time.monotonic() - begun < 3  # one event a second


def test_a_request_may_wait_for_rows(proxied):
    begun = time.monotonic()
    status, named, _ = proxied.ask("GET", "/v1/caches/half/rows?seed=1&start=0&stop=4&wait=1.5")
    assert (status, named["retry-after"]) == (503, "2")
    assert time.monotonic() - begun >= 1.5


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /v1/caches/toy/lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: 8\r\n\r\nx",
    ],
)
def test_slow_headers_and_bodies_never_reach_the_service(proxied, sent):
    before = metric(proxied.port, "kdcache_inflight_requests")
    with proxied.connect() as opened:
        opened.sendall(sent)
        begun = time.monotonic()
        time.sleep(HEADER_S / 2)
        assert metric(proxied.port, "kdcache_inflight_requests") == before
        with contextlib.suppress(OSError):
            receive_all(opened)
    assert time.monotonic() - begun < HEADER_S + 2


def test_large_headers_and_bodies_are_refused(proxied):
    assert proxied.ask("GET", "/healthz", X_Large="a" * 9_000)[0] in (400, 431)
    assert proxied.ask("GET", "/" + "a" * 9_000)[0] == 414
    assert proxied.ask("POST", "/v1/caches/toy/lookup?seed=0", b"x" * (2 << 20))[0] == 413


def test_one_client_has_no_more_requests_at_a_time_than_allowed(proxied):
    path = "/v1/caches/half/rows?seed=1&start=0&stop=4&wait=2"
    with ThreadPoolExecutor(CONNECTIONS + 8) as pool:
        calls = [pool.submit(proxied.ask, "GET", path) for _ in range(CONNECTIONS + 8)]
        answers = [call.result() for call in calls]
    served = [named for _, named, _ in answers if "retry-after" in named]
    assert {status for status, _, _ in answers} == {503}
    assert len(served) <= CONNECTIONS  # the others are nginx's own refusals
    assert len(answers) - len(served) >= 8
    assert proxied.ask("GET", "/healthz")[0] == 200


def test_a_client_that_does_not_read_is_disconnected(proxied):
    samples = (np.arange(16_000, dtype="<i4") % 100).tobytes()
    with proxied.connect(receive_bytes=4096) as opened:
        opened.sendall(
            b"POST /v1/caches/toy/lookup?seed=0 HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/octet-stream\r\n"
            b"Content-Length: %d\r\n\r\n" % len(samples)
        )
        opened.sendall(samples)
        until = time.monotonic() + 10
        while metric(proxied.port, "kdcache_held_answer_bytes") == 0:
            assert time.monotonic() < until
            time.sleep(0.02)
        while metric(proxied.port, "kdcache_held_answer_bytes"):
            assert time.monotonic() < until
            time.sleep(0.05)
