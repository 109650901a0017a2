"""A page whose name was made to resolve to this machine reads nothing from a service here."""

from __future__ import annotations

import json

import pytest
from support.asgi import ask
from support.serving import READ_TOKEN, TOKENS
from support.sockets import connect, receive_all

from cache_service.api.app import create_app
from cache_service.api.http.problems import Problem
from cache_service.api.http.settings import ServeConfig

PATHS = ["/", "/healthz", "/readyz", "/metrics", "/v1/caches", "/v1/events", "/static/app.js", "/x"]


@pytest.fixture(scope="module")
def app(root):
    return create_app(ServeConfig(root=str(root)))


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "127.8.8.8:80", "[::1]", "[::1]:9"],
)
def test_a_loopback_name_is_answered_at_any_port(app, host):
    assert ask(app, "GET", "/v1/caches", headers={"host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example#localhost",
        "evil@localhost",
        "localhost:8000.evil.example",
        "localhost\n",
        "127.0.0.1:80:80",
        "0.0.0.0",
        "192.168.0.1",
        "[::]",
        "[::1",
        "::1",
        "x" * 5000,
        "",
    ],
)
def test_any_other_name_is_answered_421_with_the_way_out(app, host):
    found = ask(app, "GET", "/v1/caches", headers={"host": host})
    problem = Problem.model_validate_json(found.body)
    assert (found.status, problem.status, problem.code) == (421, 421, "misdirected")
    assert "tokens" in problem.hint
    assert len(found.body) < 2000


@pytest.mark.parametrize("path", PATHS)
def test_no_path_is_open_to_another_name_and_neither_is_health(app, path):
    for method in ("GET", "HEAD", "POST", "DELETE", "OPTIONS"):
        assert ask(app, method, path, headers={"host": "evil.example"}).status == 421


def test_with_tokens_any_name_will_do(root):
    app = create_app(ServeConfig.model_validate({"root": str(root), "tokens": TOKENS}))
    told = {"host": "caches.example.org", "authorization": f"Bearer {READ_TOKEN}"}
    assert ask(app, "GET", "/v1/caches", headers=told).status == 200
    assert ask(app, "GET", "/healthz", headers={"host": "caches.example.org"}).status == 200


def test_a_second_host_header_does_not_hide_the_first(server):
    with connect(int(server.url.rpartition(":")[2])) as raw:
        raw.sendall(
            b"GET /v1/caches HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n"
            b"Connection: close\r\n\r\n"
        )
        head, _, body = receive_all(raw).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 4")
    assert json.loads(body)["status"] in (400, 421)
