"""Rows of a build that is under way: awaited so long and no longer, wherever they are read from."""

from __future__ import annotations

import pickle
import threading
import time

import numpy as np
import pytest
from support.caches import make_spec, write_shard
from support.ordered import epoch_in_batches, ordered_rows, same, write_ordered
from support.origin import serving

from cache_service.errors import RowsNotBuiltError
from cache_service.remote import rows, waiting
from cache_service.remote.source import open_source
from cache_service.rows.reader import open_cache
from cache_service.storage import http_client
from distill.data import load_cache, recorded_seeds

SPEC = make_spec(num_samples=90, shard_rows=32, chunk_rows=8)


@pytest.fixture(params=["folder", "server"])
def growing(request, tmp_path):
    """(url, builder): a cache of two planned seeds with one shard each, and a way to go on."""
    writer = write_ordered(tmp_path / "c", SPEC, shards=[0])

    def build(delay_s=0.1):
        rows = [ordered_rows(SPEC, seed) for seed in range(2)]

        def run():
            for seed in range(2):
                for shard in (2, 1):
                    time.sleep(delay_s)
                    write_shard(writer, seed, shard, rows=rows[seed])

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    if request.param == "folder":
        yield str(tmp_path / "c"), build
        return
    with serving(tmp_path) as origin:
        yield origin.url("c"), build


def test_a_reader_that_follows_a_build_reads_what_a_later_one_reads(growing):
    url, build = growing
    cache = pickle.loads(pickle.dumps(open_source(url, wait_s=20)))
    assert cache.wait_s == 20
    builder = build()
    found = [epoch_in_batches(cache, seed, 10) for seed in range(2)]
    builder.join()
    later = open_source(url)
    assert all(same(rows, later.read(seed, 0, 90)) for seed, rows in enumerate(found))


def test_lookups_commits_and_witnesses_are_awaited_too(growing):
    url, build = growing
    cache = open_source(url, wait_s=20)
    builder = build()
    numbers = np.arange(90)[::-1]
    found = cache.lookup(1, numbers), cache.gather(0, numbers, arrays=("logits",))
    assert cache.commit(1, 2).shard == 2
    witnesses = cache.witnesses(1, 1)
    builder.join()
    later = open_source(url)
    assert same(found[0], later.lookup(1, numbers))
    assert same(found[1], later.gather(0, numbers, arrays=("logits",)))
    assert (witnesses == later.witnesses(1, 1)).all()


def test_rows_that_do_not_come_in_time_are_refused(growing):
    url, _ = growing
    cache = open_source(url, wait_s=0.3)
    for ask, said in (
        (lambda: cache.read(1, 40, 50), r"positions \[32, 64\) of seed 1 are not recorded"),
        (lambda: cache.lookup(1, np.arange(90)), "of seed 1 (is|are) not recorded"),
        (lambda: cache.commit(0, 1), r"positions \[32, 64\) of seed 0 are not recorded"),
    ):
        began = time.monotonic()
        with pytest.raises(RowsNotBuiltError, match=said):
            ask()
        assert 0.25 < time.monotonic() - began < 1.5


def test_what_is_recorded_is_read_without_waiting_for_the_rest(growing):
    url, _ = growing
    cache = open_source(url, wait_s=20)
    began = time.monotonic()
    cache.read(0, 0, 32)
    cache.read(1, 0, 32)
    assert time.monotonic() - began < 2


def test_what_is_not_planned_is_not_awaited(growing):
    url, _ = growing
    cache = open_source(url, wait_s=20)
    began = time.monotonic()
    for ask, said in (
        (lambda: cache.read(2, 0, 5), "of seed 2 are not recorded"),
        (lambda: cache.read(0, 85, 91), "of seed 0 (was|were) requested"),
        (lambda: cache.lookup(0, np.array([90])), "90 (of the dataset )?was requested"),
        (lambda: cache.lookup(2, np.array([0])), "of seed 2 are not recorded"),
        (lambda: cache.commit(2, 0), "of seed 2 are not recorded"),
    ):
        with pytest.raises(RowsNotBuiltError, match=said):
            ask()
    assert time.monotonic() - began < 2


def test_seeds_that_are_planned_count_where_rows_are_awaited(growing):
    url, build = growing
    with pytest.raises(RowsNotBuiltError, match="no seed is complete"):
        recorded_seeds([load_cache(url)], None)
    following = load_cache(url, wait_s=5)
    assert recorded_seeds([following], None) == (0, 1)
    assert recorded_seeds([following], (1,)) == (1,)
    with pytest.raises(RowsNotBuiltError, match=r"seeds 2:3 were asked .* has 0:2 planned"):
        recorded_seeds([following], (1, 2))
    build(0).join()
    assert recorded_seeds([load_cache(url)], None) == (0, 1)


def test_a_cache_out_of_order_is_refused_where_the_order_is_relied_on(tmp_path):
    writer = write_ordered(tmp_path / "c", SPEC, seeds=1, shards=[])
    rows = ordered_rows(SPEC, 5)
    for shard in range(SPEC.num_shards):
        write_shard(writer, 0, shard, rows=rows)
    numbers = np.arange(90)
    assert open_cache(writer.storage.url).lookup(0, numbers)["sample"].tolist() == list(range(90))
    with pytest.raises(Exception, match="not stored in the order of seed 0"):
        open_source(writer.storage.url, wait_s=1).lookup(0, numbers)


def test_who_waits_says_at_once_and_every_ten_seconds_what_for(growing, caplog, monkeypatch):
    url, build = growing
    monkeypatch.setattr(http_client, "SAY_EVERY_S", 0.2)
    monkeypatch.setattr(waiting, "SAY_EVERY_S", 0.2)
    monkeypatch.setattr(rows, "MAX_SERVER_WAIT_S", 0.05)
    cache = open_source(url, wait_s=20)
    builder = build(0.5)
    began = time.monotonic()
    cache.read(0, 40, 50)
    passed_s = time.monotonic() - began
    builder.join()
    lines = [record.getMessage() for record in caplog.records if "waiting" in record.getMessage()]
    assert 2 <= len(lines) <= passed_s / 0.2 + 1
    assert lines[0].startswith("waiting for rows, 0 s of at most 20 s: ")
    assert all("positions [32, 64) of seed 0" in line for line in lines)


def test_who_need_not_wait_says_nothing(growing, caplog):
    url, _ = growing
    open_source(url, wait_s=20).read(0, 0, 8)
    assert caplog.records == []
