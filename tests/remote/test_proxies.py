"""Networks between client and server: proxies that the environment names, and what they do."""

from __future__ import annotations

import gzip
import zlib

import numpy as np
import pytest
from support.forward_proxy import forwarding
from support.ordered import same

from cache_service.errors import ConfigError, CorruptError, KdCacheError, StorageError
from cache_service.remote.cache import open_remote
from cache_service.remote.source import open_source
from cache_service.storage.http_proxy import proxy_of
from cache_service.storage.retries import NO_RETRIES

FAR = "http://teacher.internal:8000/v1/caches/c"
"""No name server knows it."""

VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


@pytest.fixture
def proxy(origin):
    with forwarding(origin.server_address[1]) as running:
        yield running


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_rows_come_through_the_proxy_that_the_environment_names(
    proxy, local, environment, variable
):
    environment.setenv(variable, proxy.url)
    cache = open_source(FAR)
    assert same(cache.read(0, 3, 90), local.read(0, 3, 90))
    numbers = np.array([5, 2])
    assert same(cache.lookup(1, numbers), local.lookup(1, numbers))
    assert proxy.asked[0] == f"GET {FAR}/zarr/zarr.json"


def test_a_proxy_may_ask_for_a_password_which_no_message_repeats(origin, local, environment):
    with forwarding(origin.server_address[1], user="us er:p@ss") as proxy:
        address = proxy.url.removeprefix("http://")
        environment.setenv("HTTP_PROXY", f"http://us%20er:p%40ss@{address}")
        assert same(open_source(FAR).read(0, 0, 4), local.read(0, 0, 4))
        assert "Proxy-Authorization" not in origin.requests[-1][2]
        environment.setenv("HTTP_PROXY", f"http://us%20er:wrong@{address}")
        with pytest.raises(ConfigError, match="is refused through the proxy") as refusal:
            open_source(FAR)
        assert "HTTP_PROXY, with status 407" in refusal.value.message
        assert "wrong" not in str(refusal.value)


def test_no_proxy_and_this_machine_are_asked_directly(proxy, origin, local, environment):
    environment.setenv("HTTP_PROXY", proxy.url)
    assert same(open_source(origin.url("c")).read(0, 0, 4), local.read(0, 0, 4))
    assert proxy.asked == []
    for no, host, goes in (
        ("internal", "teacher.internal", False),
        (".internal, other", "teacher.internal", False),
        ("*", "teacher.internal", False),
        ("10.0.0.0/8", "10.1.2.3", False),
        ("10.0.0.0/8", "11.1.2.3", True),
        ("other", "teacher.internal", True),
        ("", "10.0.0.1", True),
        ("", "localhost", False),
        ("", "::1", False),
    ):
        environment.setenv("NO_PROXY", no)
        assert (proxy_of("http", host, 8000) is not None) == goes, (no, host)
    environment.delenv("NO_PROXY")
    assert proxy_of("https", "teacher.internal", 443) is None


def test_a_proxy_that_does_not_answer_is_named(environment):
    environment.setenv("HTTP_PROXY", "127.0.0.1:1")
    with pytest.raises(StorageError, match="no answer through the proxy") as refusal:
        open_remote(FAR, retries=NO_RETRIES)
    assert "http://127.0.0.1:1 of HTTP_PROXY" in refusal.value.message
    assert "NO_PROXY=teacher.internal" in refusal.value.hint


@pytest.mark.parametrize(
    "value", ["socks5://u:secret@h:1", "http://", "http://h:secret", "ftp://h"]
)
def test_what_is_no_proxy_is_refused_without_repeating_it(environment, value):
    environment.setenv("HTTP_PROXY", value)
    with pytest.raises(ConfigError, match="HTTP_PROXY does not hold the URL") as refusal:
        open_source(FAR)
    assert "secret" not in str(refusal.value)


# --- what proxies on the way do to bodies --------------------------------------------------------


def head(reply, *, without=("Content-Length",), **more):
    kept = {k: v for k, v in reply.headers.items() if k not in without}
    lines = [f"{k}: {v}" for k, v in (kept | more | {"Connection": "close"}).items()]
    return "\r\n".join([f"HTTP/1.1 {reply.status} OK", *lines, "", ""]).encode("latin-1")


def in_chunks(body):
    pieces = [body[n : n + 1000] for n in range(0, len(body), 1000)]
    return b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def chunked(reply):
    return [head(reply, **{"Transfer-Encoding": "chunked"}), in_chunks(reply.body)]


def gzipped(reply):
    return [
        head(reply, **{"Content-Encoding": "gzip", "Transfer-Encoding": "chunked"}),
        in_chunks(gzip.compress(reply.body)),
    ]


def deflated(reply):
    body = zlib.compress(reply.body)
    more = {"Content-Encoding": "deflate", "Content-Length": str(len(body))}
    return [head(reply, without=(), **more), body]


def until_closed(reply):
    return [head(reply), reply.body]


CHANGES = (chunked, gzipped, deflated, until_closed)


def changing(origin, change, part=""):
    """Change the responses of paths with that part."""

    def misdeed(path, reply):
        if part in path:
            reply.raw = change(reply)
        return reply

    origin.misdeed = misdeed


@pytest.mark.parametrize("change", CHANGES)
def test_a_body_that_a_proxy_recoded_is_the_body_that_was_sent(origin, local, change):
    changing(origin, change)
    cache = open_remote(origin.url("c"), retries=NO_RETRIES)
    assert same(cache.read(0, 3, 90), local.read(0, 3, 90))
    assert (cache.witnesses(0, 1) == local.witnesses(0, 1)).all()
    assert cache.commits() == local.commits()
    with pytest.raises(KdCacheError, match="positions"):
        cache.read(7, 0, 4)


@pytest.mark.parametrize("change", CHANGES)
def test_damage_in_a_recoded_body_is_found(origin, change):
    cache = open_remote(origin.url("c"), retries=NO_RETRIES)

    def flip(reply):
        body = bytearray(reply.body)
        body[-1] ^= 1
        reply.body = bytes(body)
        return change(reply)

    changing(origin, flip, "/rows")
    with pytest.raises(CorruptError, match="damaged on the way"):
        cache.read(0, 3, 90)


SPOILED = {
    "cut chunks": (lambda r: [chunked(r)[0], in_chunks(r.body)[:-300]], "got no answer"),
    "cut gzip": (
        lambda r: [gzipped(r)[0], in_chunks(gzip.compress(r.body)[:-9])],
        "ends too early",
    ),
    "cut deflate": (lambda r: [deflated(r)[0], deflated(r)[1][:-9]], "9 more expected"),
    "no gzip": (lambda r: [gzipped(r)[0], in_chunks(b"no gzip" * 100)], "not gzip as stated"),
    "brotli": (lambda r: [head(r, **{"Content-Encoding": "br"}), r.body], "compressed as 'br'"),
    "coding": (lambda r: [head(r, **{"Transfer-Encoding": "x"}), r.body], "transfer coding 'x'"),
    "long chunks": (lambda r: [chunked(r)[0], in_chunks(bytes(1 << 20))], "too long"),
    "bomb": (lambda r: [gzipped(r)[0], in_chunks(gzip.compress(bytes(64 << 20)))], "too long"),
}


@pytest.mark.parametrize(("change", "said"), SPOILED.values(), ids=SPOILED)
def test_a_recoded_body_that_is_cut_or_blown_up_is_refused(origin, change, said):
    cache = open_remote(origin.url("c"), retries=NO_RETRIES)
    changing(origin, change, "/rows")
    with pytest.raises((CorruptError, StorageError), match=said):
        cache.read(0, 3, 90)
