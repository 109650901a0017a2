"""A cache on a server gives the very rows, refusals and facts that its folder gives."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from support.caches import make_head, make_spec
from support.command import kd_cache
from support.ordered import epoch_in_batches, same, write_ordered
from support.origin import serving

from cache_service.errors import (
    NotACacheError,
    RowsNotBuiltError,
    SpecMismatchError,
    UnsupportedError,
)
from cache_service.remote.cache import RemoteCache
from cache_service.remote.source import open_source
from cache_service.rows.reader import open_cache
from cache_service.rows.verify import verify_cache
from cache_service.storage import open_storage

CODECS = [
    {"kind": "dense", "compression": "zstd"},
    {"kind": "int8"},
    {"kind": "topk", "k": 4},
    {"kind": "features", "num_channels": 6},
]


def test_ranges_of_every_size_are_the_rows_of_the_folder(origin, local):
    cache = open_source(origin.url("c"))
    assert isinstance(cache, RemoteCache)
    for seed, size in ((0, 7), (1, 64), (0, 300), (1, 299)):
        assert same(epoch_in_batches(cache, seed, size), local.read(seed, 0, 300))


def test_lookups_are_the_rows_of_the_folder_in_the_order_asked_for(origin, local):
    cache = open_source(origin.url("c"))
    numbers = np.array([299, 3, 3, 0, 120], np.int64)
    assert same(cache.lookup(1, numbers), local.lookup(1, numbers))
    assert same(cache.gather(1, numbers), local.gather(1, numbers))
    assert same(cache.lookup(0, numbers[:0]), local.gather(0, numbers[:0]))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec["kind"])
def test_every_codec_travels(tmp_path, codec):
    spec = make_spec(num_samples=50, shard_rows=32, chunk_rows=8, codec=codec)
    write_ordered(tmp_path / "c", spec, seeds=1)
    folder = open_cache(str(tmp_path / "c"))
    with serving(tmp_path) as origin:
        cache = open_source(origin.url("c"))
        assert same(cache.read(0, 3, 41), folder.read(0, 3, 41))
        assert (cache.witnesses(0, 1) == folder.witnesses(0, 1)).all()
        head = cache.head()
    wanted = make_head(spec)
    assert (head is None) == (wanted is None)
    assert head is None or all((a == b).all() for a, b in zip(head, wanted, strict=True))


def test_only_the_arrays_asked_for_travel(origin, local):
    cache = open_source(origin.url("c"))
    found = cache.read(0, 5, 9, arrays=("digest",))
    assert same(found, local.read(0, 5, 9, arrays=("digest",)))
    assert "&arrays=sample,digest&" in origin.targets("/rows")[0]
    numbers = np.array([4, 2], np.int64)
    found = cache.lookup(0, numbers, arrays=("logits", "sample"))
    assert same(found, local.lookup(0, numbers, arrays=("logits", "sample")))


def test_what_is_known_of_a_cache_is_what_its_folder_says(origin, local):
    cache = open_source(origin.url("c"), fingerprint=local.fingerprint)
    assert (cache.spec, cache.versions, cache.group) == (local.spec, local.versions, local.group)
    assert (cache.num_seeds(), cache.complete_seeds()) == (2, [0, 1])
    assert cache.commits() == local.commits()
    assert cache.commit(1, 2).objects.keys() == local.commit(1, 2).objects.keys()


def test_rows_that_are_not_there_are_refused_as_the_folder_refuses_them(origin):
    cache = open_source(origin.url("c"))
    with pytest.raises(RowsNotBuiltError, match=r"positions \[0, 64\) of seed 2"):
        cache.read(2, 0, 4)
    for ask, said in (
        (lambda: cache.read(0, 298, 301), "row 300 of seed 0 was requested"),
        (lambda: cache.read(0, 5, 5), r"`start` \(5\) must be smaller than `stop` \(5\)"),
        (lambda: cache.gather(0, np.array([0, 300])), "row 300 of seed 0 was requested"),
        (lambda: cache.lookup(0, np.array([-1])), "row -1 of the dataset was requested"),
    ):
        with pytest.raises(RowsNotBuiltError, match=said):
            ask()


def test_another_cache_than_the_one_asked_for_is_refused(origin):
    with pytest.raises(SpecMismatchError, match=f"but {'0' * 64} was requested"):
        open_source(origin.url("c"), fingerprint="0" * 64)
    with pytest.raises(NotACacheError, match="no cache at"):
        open_source(origin.url("nothing"))


def test_a_cache_that_becomes_another_is_refused(tmp_path):
    write_ordered(tmp_path / "c", make_spec(num_samples=50), seeds=1)
    with serving(tmp_path) as origin:
        cache = open_source(origin.url("c"))
        cache.read(0, 0, 10)
        (tmp_path / "c").rename(tmp_path / "old")
        write_ordered(tmp_path / "c", make_spec(num_samples=50, weights="b" * 64), seeds=1)
        for ask in (
            lambda: cache.read(0, 30, 37),
            lambda: cache.lookup(0, np.array([1])),
            cache.complete_seeds,
        ):
            with pytest.raises(SpecMismatchError, match="the server holds another cache"):
                ask()


def test_a_pickled_cache_reads_on(origin, local):
    cache = open_source(origin.url("c"))
    cache.read(0, 0, 8)
    again = pickle.loads(pickle.dumps(cache))
    assert same(again.read(0, 8, 16), local.read(0, 8, 16))


def test_a_sequence_of_batches_is_asked_for_once_each(origin):
    cache = open_source(origin.url("c"))
    epoch_in_batches(cache, 0, 50)
    asked = origin.targets("/rows")
    assert len(asked) == len(set(asked)) == 6


def test_the_workers_of_a_loader_ask_for_each_batch_once_but_for_their_first_guess(origin):
    for worker in range(2):
        cache = open_source(origin.url("c"))
        for low in range(25 * worker, 300, 50):
            cache.read(0, low, low + 25)
    assert len(origin.targets("/rows")) == 12 + 2


def test_a_long_range_is_asked_for_in_parts(origin, local, monkeypatch):
    monkeypatch.setattr("cache_service.remote.prefetch.MAX_REQUEST_ROWS", 40)
    cache = open_source(origin.url("c"))
    assert same(cache.read(0, 10, 130), local.read(0, 10, 130))
    numbers = np.arange(90)[::-1]
    assert same(cache.lookup(0, numbers), local.lookup(0, numbers))
    assert len(origin.targets("/lookup")) == 3


def test_info_and_verify_take_a_url(origin, root):
    there = json.loads(kd_cache("info", str(root / "c"), "--json").out)
    ended = kd_cache("info", origin.url("c"), "--json")
    assert json.loads(ended.out) == there | {"cache": origin.url("c")}
    ended = kd_cache("verify", origin.url("c"))
    assert (ended.code, "600 rows in 10 shards are intact" in ended.out) == (0, True)


def test_verify_sees_damage_through_a_server(tmp_path):
    write_ordered(tmp_path / "c", make_spec(num_samples=50), seeds=1)
    path = tmp_path / "c/logits/c/0/0/0/0"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with serving(tmp_path) as origin:
        found = verify_cache(open_cache(origin.url("c")))
    assert [(seed, shard) for seed, shard, _ in found.damaged] == [(0, 0)]
    ended = None
    with serving(tmp_path) as origin:
        ended = kd_cache("verify", origin.url("c"), "--repair")
    assert ended.code == 2
    assert "cannot be written: HTTP access to a cache is read-only" in ended.err


@pytest.mark.parametrize("write", ["put", "create", "delete", "begin"])
def test_nothing_is_written_through_a_server(origin, write):
    storage = open_storage(origin.url("c"))
    arguments = ("key", b"content")[: 2 if write in ("put", "create") else 1]
    with pytest.raises(UnsupportedError, match="HTTP access to a cache is read-only"):
        getattr(storage, write)(*arguments)


def test_objects_of_a_server_are_read_as_files_are(origin, root):
    storage, folder = open_storage(origin.url("c")), open_storage(str(root / "c"))
    key = "sample/c/0/0"
    assert storage.get(key) == folder.get(key)
    assert storage.size(key) == folder.size(key)
    ranges = [(0, 3), (3, 10), (20, 30)]
    assert storage.get_ranges(key, ranges) == folder.get_ranges(key, ranges)
    size = folder.size(key)
    assert storage.get_ranges(key, [(size - 2, size + 9)]) == [folder.get(key)[-2:]]
    assert storage.get_ranges(key, [(size + 5, size + 9)]) == [b""]
    assert storage.list("commits/") == [
        k for k in folder.list("commits/") if k != "commits/zarr.json"
    ]
    assert storage.get("nothing") is storage.size("nothing") is storage.map("nothing") is None
    assert storage.get_ranges("nothing", [(0, 1)]) is None
    with pytest.raises(UnsupportedError, match="lists the keys below commits/ only"):
        storage.list("")
