"""What passes is tried again, within bounds; what does not pass is refused at once."""

from __future__ import annotations

import json
import random
import time

import numpy as np
import pytest
import torch
from support.ordered import QUICK, epoch_in_batches, same
from support.origin import PROBLEM
from support.proxy import Fault, proxied

from cache_service.errors import (
    ConfigError,
    CorruptError,
    KdCacheError,
    NotACacheError,
    OutOfSpaceError,
    RowsNotBuiltError,
    StorageError,
)
from cache_service.remote.cache import open_remote
from cache_service.storage import retries
from cache_service.storage.retries import NO_RETRIES


def answers(status, code=None, **headers):
    """A misdeed: rows are answered with an error, told in a problem document if there is a code."""

    def misdeed(path, reply):
        if "/rows" not in path:
            return reply
        document = {"status": status, "code": code, "detail": "because", "hint": "Do that."}
        reply.status = status
        reply.body = json.dumps(document).encode() if code else b"<html>"
        kind = PROBLEM if code else "text/html"
        reply.headers = {"Content-Type": kind, "Content-Length": str(len(reply.body)), **headers}
        return reply

    return misdeed


@pytest.mark.parametrize(
    ("status", "code", "kind", "said", "asked"),
    [
        (401, "unauthorized", ConfigError, "asks for a token, and none is set here", 1),
        (403, "forbidden", ConfigError, "asks for a token, and none is set here", 1),
        (404, "not_a_cache", NotACacheError, "says: because", 1),
        (404, "rows_not_built", RowsNotBuiltError, "says: because", 1),
        (409, "spec_mismatch", KdCacheError, "says: because", 1),
        (413, "too_large", StorageError, "says: because", 1),
        (422, "config", ConfigError, "says: because", 1),
        (500, "corrupt", CorruptError, "says: because", 1),
        (507, "out_of_space", OutOfSpaceError, "says: because", 6),
        (500, "error", StorageError, "says: because", 6),
        # Perhaps damage on the way: no document says the same.
        (401, None, ConfigError, "asks for a token, and none is set here", 6),
        (404, None, NotACacheError, "no cache at .*: the server there answers 404", 6),
        (500, None, StorageError, "is answered with status 500", 6),
        (302, None, StorageError, r"is redirected \(302\)", 1),
        (503, "rows_not_built", RowsNotBuiltError, "says: because", 1),
    ],
)
def test_what_a_server_refuses_is_refused_after_so_many_questions(
    origin, status, code, kind, said, asked
):
    cache = open_remote(origin.url("c"), retries=QUICK)
    origin.misdeed = answers(status, code)
    with pytest.raises(kind, match=said):
        cache.read(0, 0, 5)
    assert len(origin.targets("/rows")) == asked


def test_a_refusal_repeats_what_the_server_says_and_what_to_do(origin):
    cache = open_remote(origin.url("c"), retries=NO_RETRIES)
    origin.misdeed = answers(422, "config")
    with pytest.raises(ConfigError, match="says: because") as refusal:
        cache.read(0, 0, 5)
    assert str(refusal.value) == f"{origin.url('c')} says: because Do that."


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again_until_it_answers(origin, local, status):
    cache = open_remote(origin.url("c"), retries=QUICK)
    busy, left = answers(status, "busy"), iter(range(9))
    origin.misdeed = lambda path, reply: (
        busy(path, reply) if "/rows" in path and next(left, None) is not None else reply
    )
    assert same(cache.read(0, 0, 5), local.read(0, 0, 5))
    assert len(origin.targets("start=0")) == 10


def test_a_server_is_left_the_time_that_it_asks_for(origin, local):
    cache = open_remote(origin.url("c"), retries=QUICK)
    busy, left = answers(503, "busy", **{"Retry-After": "1"}), iter(range(1))
    origin.misdeed = lambda path, reply: (
        busy(path, reply) if next(left, None) is not None else reply
    )
    began = time.monotonic()
    cache.read(0, 0, 5)
    assert 1 <= time.monotonic() - began < 3


def test_a_server_cannot_ask_for_more_time_than_there_is(origin):
    cache = open_remote(origin.url("c"), retries=QUICK)
    origin.misdeed = answers(503, "busy", **{"Retry-After": "9" * 12})
    began = time.monotonic()
    with pytest.raises(StorageError, match="because"):
        cache.read(0, 0, 5)
    assert time.monotonic() - began < 1


def test_a_wrong_address_is_said_soon_and_a_lost_server_is_waited_for(origin):
    brief = QUICK._replace(first_s=0.2, total_s=0.6)
    cache = open_remote(origin.url("c"), retries=brief)
    url = "http://127.0.0.1:9/v1/caches/c"
    began = time.monotonic()
    with pytest.raises(StorageError, match="got no answer") as refusal:
        open_remote(url, retries=brief)
    first_s = time.monotonic() - began
    assert refusal.value.message.endswith("got no answer: Connection refused.")
    assert "kd-cache serve" in refusal.value.hint
    origin.misdeed = lambda _path, _reply: None
    began = time.monotonic()
    with pytest.raises(StorageError, match="got no answer"):
        cache.read(0, 0, 5)
    assert first_s < 0.3 < 0.5 < time.monotonic() - began < 0.9


def test_an_outage_is_told_once_when_it_lasts(origin, monkeypatch, caplog):
    monkeypatch.setattr(retries, "WARN_AFTER_S", 0.05)
    cache = open_remote(origin.url("c"), retries=QUICK._replace(total_s=1.5))
    origin.misdeed = lambda _path, _reply: None
    with pytest.raises(StorageError, match="got no answer"):
        cache.read(0, 0, 5)
    assert len(caplog.records) == 1
    assert "got no answer" in caplog.text


def test_damage_on_the_way_is_asked_for_again(origin, local):
    cache = open_remote(origin.url("c"), retries=QUICK)
    spoilt = iter([10, 200, 3000])

    def misdeed(path, reply):
        at = next(spoilt, None) if "/rows" in path else None
        if at is not None:
            reply.body = reply.body[:at] + bytes([reply.body[at] ^ 1]) + reply.body[at + 1 :]
        return reply

    origin.misdeed = misdeed
    assert same(cache.read(0, 0, 9), local.read(0, 0, 9))


def test_no_generator_of_the_run_is_drawn_from(origin):
    cache = open_remote(origin.url("c"), retries=QUICK)
    left = iter(range(3))
    origin.misdeed = lambda _path, reply: None if next(left, None) is not None else reply
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    cache.read(0, 0, 9)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert after == before


FAULTS = [
    Fault(latency_s=0.005, close_at=40_000),
    Fault(reset_at=8000),
    Fault(close_at=30_000),
    Fault(flip_at=5000, close_at=20_000),
    Fault(reset_at=0),
    Fault(flip_at=60_000, close_at=70_000),
    Fault(bytes_per_s=2e6, close_at=50_000),
    Fault(close_at=10),
]


def test_a_bad_line_costs_time_and_never_a_row(origin, local):
    with proxied(origin.server_address[1], FAULTS) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/v1/caches/c"
        cache = open_remote(url, retries=QUICK._replace(attempts=12))
        for seed in range(2):
            assert same(epoch_in_batches(cache, seed, 16), local.read(seed, 0, 300))
        numbers = np.arange(300)[::-6]
        assert same(cache.lookup(1, numbers), local.lookup(1, numbers))
        assert proxy.connections > len(FAULTS)
