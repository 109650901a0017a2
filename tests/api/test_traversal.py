"""No name and no key leads out of the root: 2,000 hostile ones, and some over a raw socket."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.asgi import ask
from support.caches import make_spec, write_cache

from cache_service.api.app import create_app
from cache_service.api.http.settings import ServeConfig

SECRET = b"from outside of the root"
MARK = b'"purpose":"outside"'

UP = [
    "..", ".", "%2e%2e", "%2E%2E", ".%2e", "%252e%252e", "..%2f", "..%5c", "%2e%2e%2f", "..;",
    "\u2025", "\uff0e\uff0e", "%c0%ae%c0%ae", "%e0%80%ae%e0%80%ae", "..\\", "%00", "..%00", "...",
    "%ff", "%ed%a0%80", " ..", ".. ", "..%20", "~", "$HOME", "%0d%0a",
]  # fmt: skip
PLACES = [
    "dense", "linked", "secret.txt", "elsewhere", "cache", "zarr.json", "stray.txt", "zarr",
    "etc/passwd", "/etc/passwd", "C:", "file:", "logits", "c", "0", "sample", "rows", "lookup",
    "commits", "proc/self/environ", "//etc/passwd", "hole", "x" * 300, "a/" * 200,
]  # fmt: skip
PARTS = st.lists(st.sampled_from(UP + PLACES), min_size=1, max_size=8)
JOINS = st.sampled_from(["/", "%2f", "%2F", "//", "\\", "%5c", "%252f"])
FRONTS = st.sampled_from(
    [
        "/v1/caches/",
        "/v1/caches/dense/zarr/",
        "/v1/caches/linked/zarr/",
        "/static/",
        "/caches/",
        "/",
    ]
)


@pytest.fixture(scope="module")
def app(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("around") / "root"
    folder.mkdir()
    (folder.parent / "secret.txt").write_bytes(SECRET)
    (folder / "stray.txt").write_bytes(SECRET)
    outside = folder.parent / "elsewhere"
    write_cache(str(outside / "cache"), make_spec(weights="e" * 64), range(1))
    write_cache(str(folder / "dense"), make_spec(), range(1))
    (folder / "linked").symlink_to(outside / "cache")
    (folder / "dense" / "hole").symlink_to(folder.parent)
    inside = folder / "dense/logits/c/0/1/0/0"
    inside.unlink()
    inside.symlink_to(outside / "cache/logits/c/0/1/0/0")
    return create_app(ServeConfig(root=str(folder)))


def outside_bytes():
    return (SECRET, b"root:", b"e" * 64, os.environ["PATH"].encode())


def check(app, path):
    found = ask(app, "GET", path)
    assert found.status in (200, 400, 404, 405, 422), (path, found)  # 405: GET of a lookup
    if found.status == 200:  # a path that leads nowhere else than it says
        assert found.headers["content-type"].split(";")[0] in (
            "application/json",
            "text/html",
            "application/octet-stream",
        )
    for secret in outside_bytes():
        assert secret not in found.body, path


@settings(max_examples=200)
@given(front=FRONTS, parts=PARTS, join=JOINS)
def test_no_path_leads_out(app, front, parts, join):
    check(app, front + join.join(parts))


@pytest.mark.faults
@settings(max_examples=2000)
@given(front=FRONTS, parts=PARTS, join=JOINS)
def test_no_path_of_two_thousand_leads_out(app, front, parts, join):
    check(app, front + join.join(parts))


@settings(max_examples=100)
@given(key=st.text(max_size=60))
def test_no_text_is_a_key_but_those_of_the_cache(app, key):
    check(app, "/v1/caches/dense/zarr/" + key)


def test_an_object_that_is_a_link_to_elsewhere_is_not_sent(app):
    found = ask(app, "GET", "/v1/caches/dense/zarr/logits/c/0/1/0/0")
    assert found.status == 500
    assert b'"corrupt"' in found.body


@pytest.mark.parametrize(
    "target",
    [
        b"/v1/caches/../../secret.txt",
        b"/v1/caches/dense/zarr/../../../secret.txt",
        b"/v1/caches/dense/zarr/%2e%2e/%2e%2e/secret.txt",
        b"/v1/caches/dense/zarr/..%2f..%2f..%2fsecret.txt",
        b"/v1/caches/dense/zarr/\xff\xfe/..",
        b"/v1/caches/dense/zarr//etc/passwd",
        b"/v1/caches/dense/zarr/%00",
        b"/v1/caches/%2fetc%2fpasswd",
        b"/static/../pages.py",
        b"/static/%2e%2e/pages.py",
        b"/static/..%5cpages.py",
        b"/static//etc/passwd",
        b"/static/\x00",
        b"/caches/../../secret.txt",
        b"/caches/..%2f..%2fsecret.txt",
        b"/caches/linked",
        b"/v1/caches/linked",
        b"/v1/caches/.",
        b"/v1/caches/..",
        b"/v1/caches/%2e%2e/rows?seed=0&start=0&stop=1",
        b"/v1/caches/stray.txt",
        b"/v1/caches/\xe2\x80\xa5",
        b"//etc/passwd",
        b"http://127.0.0.1/v1/caches/../secret.txt",
        b"file:///etc/passwd",
        b"/v1/caches/" + b"%2e" * 5000,
    ],
)
def test_no_raw_request_leads_out(server, target):
    address = urlparse(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as raw:
        raw.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = b""
        while piece := raw.recv(65536):
            answer += piece
    status = int(answer.split()[1])
    assert status in (400, 404), answer[:200]
    assert SECRET not in answer
    assert b"root:" not in answer
