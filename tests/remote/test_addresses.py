"""Where a server is, and the token that it is asked with: never in a URL, a pickle or a message."""

from __future__ import annotations

import logging
import pickle

import numpy as np
import pytest
from support.origin import PROBLEM

from cache_service.errors import ConfigError, KdCacheError, NotACacheError
from cache_service.remote.cache import open_remote
from cache_service.remote.source import DiskSettings, open_source
from cache_service.storage.http_client import parse_address, read_token
from cache_service.storage.retries import NO_RETRIES

CANARY = "canary-5b1d0c3f9e"


@pytest.mark.parametrize(
    ("url", "wanted"),
    [
        ("http://host/v1/caches/c/", "http://host/v1/caches/c"),
        ("https://host:443/v1/caches/c", "https://host/v1/caches/c"),
        ("http://Host:8000", "http://host:8000"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x"),
    ],
)
def test_an_address_has_one_spelling(url, wanted):
    assert parse_address(url).url == wanted


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://", "is not the URL of a server"),
        ("http:///path", "is not the URL of a server"),
        ("http://host:port/", "has an invalid host or port"),
        ("http://host:99999/", "has an invalid host or port"),
        ("http://ho st/", "is not the URL of a server"),
        ("http://host/a\nb", "is not the URL of a server"),
        ("http://host/a\tb", "is not the URL of a server"),
        ("http://host/\u00e9", "is not the URL of a server"),
        ("http://host\\@evil/", "holds a user name or a password"),
        ("http://host/c?token=x", "has a query or a fragment"),
        ("http://host/c#x", "has a query or a fragment"),
        ("http://host/c?", "has a query or a fragment"),
        ("http://[::1/", "has an invalid host or port"),
    ],
)
def test_what_is_no_address_of_a_cache_is_refused(url, said):
    with pytest.raises(ConfigError, match=said):
        open_source(url)


def test_an_address_without_its_scheme_is_told_which_one(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="without its scheme") as refusal:
        open_source("host:8000/v1/caches/c")
    assert refusal.value.hint == "Write http://host:8000/v1/caches/c"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotACacheError, match="no cache at"):
        open_source("v1/caches/c")


@pytest.mark.parametrize("user", [CANARY, f"me:{CANARY}", f":{CANARY}", "@"])
def test_a_password_in_a_url_is_refused_and_not_repeated(user):
    with pytest.raises(ConfigError, match="holds a user name or a password") as refusal:
        open_source(f"https://{user}@host/v1/caches/c")
    assert CANARY not in str(refusal.value)
    assert "KD_CACHE_TOKEN" in refusal.value.hint


def test_a_token_comes_from_the_environment_or_the_file_that_it_names(monkeypatch, tmp_path):
    assert read_token() is None
    (tmp_path / "token").write_text(f"{CANARY}\n")
    monkeypatch.setenv("KD_CACHE_TOKEN_FILE", str(tmp_path / "token"))
    assert read_token() == CANARY
    monkeypatch.setenv("KD_CACHE_TOKEN", "other")
    assert read_token() == "other"


@pytest.mark.parametrize(
    "token", [f"{CANARY}\r\nX: y", f"{CANARY} x", f"{CANARY}\u00e9", "x" * 1025]
)
def test_what_is_no_token_is_refused_and_not_repeated(monkeypatch, tmp_path, token):
    monkeypatch.setenv("KD_CACHE_TOKEN", token)
    with pytest.raises(ConfigError, match="KD_CACHE_TOKEN does not hold a token") as refusal:
        read_token()
    assert CANARY not in str(refusal.value)
    monkeypatch.delenv("KD_CACHE_TOKEN")
    monkeypatch.setenv("KD_CACHE_TOKEN_FILE", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token()


def test_a_server_that_wants_a_token_gets_it_and_another_one_is_refused(origin, monkeypatch):
    origin.token = CANARY
    with pytest.raises(ConfigError, match=r"asks for a token.*\(401\)") as refusal:
        open_source(origin.url("c"))
    assert "KD_CACHE_TOKEN" in refusal.value.hint
    monkeypatch.setenv("KD_CACHE_TOKEN", CANARY)
    assert open_source(origin.url("c")).complete_seeds() == [0, 1]
    assert CANARY not in " ".join(target for _, target, _ in origin.requests)


def test_the_token_is_in_no_pickle_log_or_message(origin, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("KD_CACHE_TOKEN", CANARY)
    origin.token = CANARY
    disk = DiskSettings(str(tmp_path / "disk"))
    cache = open_remote(origin.url("c"), retries=NO_RETRIES)
    cache.read(0, 0, 8)
    open_source(origin.url("c"), disk=disk).read(0, 0, 8)
    said = [pickle.dumps(cache).decode("latin-1"), repr(cache), repr(vars(cache)), caplog.text]
    said += [repr(vars(cache.storage.client)), repr(vars(cache._rows))]
    said += [path.read_bytes().decode("latin-1") for path in (tmp_path / "disk").iterdir()]

    told = dict.fromkeys((400, 404, 500, 503), r"says: \*\*\*")
    told |= {401: "does not know the token that was sent", 302: r"is redirected \(302\)"}
    for status, what in told.items():
        origin.misdeed = lambda _path, reply, s=status: echoing(reply, s)
        for ask in (lambda: cache.read(0, 50, 60), lambda: cache.lookup(0, np.array([3]))):
            with pytest.raises(KdCacheError, match=what) as refusal:
                ask()
            said.append(f"{refusal.value} {refusal.value!r}")
    assert not [text for text in said if CANARY in text]
    assert any("***" in text for text in said)


def echoing(reply, status):
    """What a proxy says that repeats the request in its answer."""
    text = f'{{"status": {status}, "code": "x", "detail": "{CANARY}", "hint": "{CANARY}"}}'
    reply.status, reply.body = status, text.encode()
    reply.headers = {
        "Content-Type": PROBLEM,
        "Content-Length": str(len(reply.body)),
        "Location": f"http://elsewhere/{CANARY}",
    }
    return reply
