"""A bucket read through copies: each byte once a host, what the bucket has, within the bound."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import s3
from support.caches import make_spec, write_cache
from support.damage import exchange
from support.ordered import same

from cache_service.errors import ConfigError, CorruptError
from cache_service.remote.source import DiskSettings, open_source
from cache_service.rows.reader import open_cache
from cache_service.storage import open_storage

CODECS = {"plain": {"kind": "dense"}, "packed": {"kind": "topk", "k": 4, "compression": "zstd"}}


@pytest.fixture(params=CODECS)
def spec(request):
    """100 rows in 4 shards of 4 chunks."""
    return make_spec(codec=CODECS[request.param])


@pytest.fixture
def bucket(monkeypatch):
    """The server of the bucket, as it is asked."""
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    with s3.counted_bucket(monkeypatch) as proxy:
        yield proxy


@pytest.fixture
def own_url(bucket, spec):
    """A recorded cache of one test, which may change it."""
    url = s3.new_prefix()
    write_cache(url, spec)
    return url


@pytest.fixture(scope="module")
def written():
    """Caches that all tests read, by codec."""
    return {}


@pytest.fixture
def url(bucket, spec, written):
    """A recorded cache of two seeds in the bucket, of which nothing was asked yet."""
    if spec.codec.kind not in written:
        written[spec.codec.kind] = s3.new_prefix()
        write_cache(written[spec.codec.kind], spec, range(2))
    bucket.asked.clear()
    return written[spec.codec.kind]


def staged(url, folder, **settings):
    return open_source(url, disk=DiskSettings(str(folder), **settings))


def row_bytes(url, seeds=(0,)):
    """Bytes of all row objects of these seeds."""
    cache = open_cache(url)
    keys = [
        key
        for seed in seeds
        for shard in range(cache.spec.num_shards)
        for name, key in cache.layout.object_keys(seed, shard).items()
        if name != "witness"
    ]
    return sum(cache.storage.size(key) for key in keys)


def copies(folder):
    return sorted(Path(folder).glob("*.rows"))


def read_share(task):
    """Every n-th batch of an epoch, as a loader's worker reads it, and a digest of the rows."""
    cache, environment, first, step = task
    os.environ.update(environment)
    if isinstance(cache, tuple):
        cache = staged(*cache)
    rows = [cache.read(0, low, low + 5) for low in range(5 * first, 100, 5 * step)]
    return [hashlib.sha256(pickle.dumps(each)).hexdigest() for each in rows]


# A pool's processes import NumPy and obstore: some seconds on two cores.
@pytest.mark.parametrize("spec", ["plain"], indirect=True)
@pytest.mark.parametrize("workers", [4, "two processes"])
def test_each_byte_is_fetched_once_a_host_and_not_again(url, bucket, tmp_path, workers):
    cache = (url, tmp_path) if workers == "two processes" else staged(url, tmp_path)
    count = 2 if workers == "two processes" else workers
    environment = dict(os.environ) | {"AWS_ENDPOINT_URL": bucket.url}
    with multiprocessing.get_context("forkserver").Pool(count) as pool:
        for expected in (row_bytes(url), 0):
            bucket.asked.clear()
            tasks = [(cache, environment, number, count) for number in range(count)]
            found = pool.map(read_share, tasks, chunksize=1)
            assert bucket.num_bytes() == expected
    plain = open_cache(url)
    for number, share in enumerate(found):
        assert share == read_share((plain, {}, number, count))


def test_a_second_epoch_asks_for_nothing(url, bucket, tmp_path):
    cache = open_source(url, disk=DiskSettings(str(tmp_path)), open_shards=1)
    wanted = open_cache(url).read(0, 0, 100)
    assert same(cache.read(0, 0, 100), wanted)
    bucket.asked.clear()
    for positions in (np.arange(100), np.random.default_rng(0).permutation(100)):
        found = cache.gather(0, positions)
        assert same(found, {name: values[positions] for name, values in wanted.items()})
    assert bucket.asked == []


def test_damaged_copies_are_fetched_again(url, bucket, tmp_path):
    wanted = open_cache(url).read(0, 0, 100)
    staged(url, tmp_path).read(0, 0, 100)
    files = copies(tmp_path)
    for number, path in enumerate(files):
        content = bytearray(path.read_bytes())
        if number % 4 == 0:
            path.write_bytes(content[: len(content) // 2])
        elif number % 4 == 1:
            path.write_bytes(b"")
        elif number % 4 == 2:
            exchange(path, files[number - 2])
        else:
            content[len(content) // 3] ^= 1
            path.write_bytes(content)
    bucket.asked.clear()
    assert same(staged(url, tmp_path).read(0, 0, 100), wanted)
    assert row_bytes(url) <= bucket.num_bytes() <= 2 * row_bytes(url)  # a shard's copies go at once
    bucket.asked.clear()
    assert same(staged(url, tmp_path).read(0, 0, 100), wanted)
    assert bucket.num_bytes() == 0


def test_damage_in_the_bucket_is_refused_with_and_without_a_copy(own_url, tmp_path):
    url, storage = own_url, open_storage(own_url)
    key = open_cache(url).layout.object_keys(0, 1)["sample"]
    content = bytearray(storage.get(key))
    content[2] ^= 4
    storage.put(key, bytes(content))
    for _ in range(2):
        with pytest.raises(CorruptError, match=f"{url}/{key}"):
            staged(url, tmp_path).read(0, 0, 100)


def test_rows_of_a_cache_that_was_replaced_are_never_read(own_url, spec, tmp_path):
    url = own_url
    before = staged(url, tmp_path)
    old = before.read(0, 0, 100)
    storage = open_storage(url)
    for key in storage.list("commits/"):
        storage.delete(key)
    write_cache(url, spec, salt=7)  # the same spec: another device's last bits, say
    new = open_cache(url).read(0, 0, 100)
    assert not same(new, old)
    assert same(staged(url, tmp_path).read(0, 0, 100), new)
    # A reader that is open has the old commits, and finds that they are those of no copy.
    before._start_empty()
    assert same(before.read(0, 0, 100), new)
    for key in storage.list(""):
        storage.delete(key)
    write_cache(url, make_spec(codec=dict(spec.codec), weights="b" * 64), salt=9)
    assert same(staged(url, tmp_path).read(0, 0, 100), open_cache(url).read(0, 0, 100))
    with pytest.raises(CorruptError, match="fingerprint"):
        pickle.loads(pickle.dumps(before)).read(0, 0, 100)


def test_copies_stay_within_their_bound_and_an_open_map_outlives_its_copy(url, tmp_path):
    bound = 46_000  # an epoch, not two
    cache = staged(url, tmp_path, max_bytes=bound)
    wanted = [open_cache(url).read(seed, 0, 100) for seed in (0, 1)]
    kept = cache.storage.map(cache.layout.object_keys(0, 0)["sample"])
    content = kept.tobytes()
    for seed in (0, 1, 0):
        for low in range(0, 100, 10):
            found = cache.read(seed, low, low + 10)
            assert same(found, {n: v[low : low + 10] for n, v in wanted[seed].items()})
            assert sum(path.stat().st_size for path in copies(tmp_path)) <= bound
    for path in copies(tmp_path):
        path.unlink()
    assert kept.tobytes() == content


def test_a_disk_that_refuses_is_done_without(url, tmp_path, caplog, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = staged(url, tmp_path)
    caplog.clear()
    monkeypatch.setattr(Path, "write_bytes", full)
    assert same(cache.read(0, 0, 100), open_cache(url).read(0, 0, 100))
    assert [record.message.count("No space left") for record in caplog.records] == [1]
    assert copies(tmp_path) == []


def test_half_of_a_nearly_full_disk_stays_free(url, tmp_path, caplog, monkeypatch):
    cache = staged(url, tmp_path)
    caplog.clear()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5000))
    assert same(cache.read(0, 0, 100), open_cache(url).read(0, 0, 100))
    assert "only 5.0 kB are free, and half of them stay free" in caplog.text
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= 5000


def test_a_bound_below_two_shards_is_refused_and_zero_keeps_nothing(url, bucket, tmp_path):
    with pytest.raises(ConfigError, match="disk_cache_bytes is 4000, but a batch may") as refusal:
        staged(url, tmp_path, max_bytes=4000)
    enough = int(refusal.value.hint.split(":")[1].split()[0])
    staged(url, tmp_path, max_bytes=enough)
    cache = staged(url, tmp_path, max_bytes=0)
    cache.read(0, 0, 100)
    assert bucket.num_bytes() == row_bytes(url)
    assert copies(tmp_path) == []


def test_by_default_copies_lie_in_the_users_cache_folder_which_is_said_once(
    url, tmp_path, caplog, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    open_source(url).read(0, 0, 100)
    assert copies(tmp_path / "kd-cache")
    (said,) = [record.message for record in caplog.records]
    assert f"{url} is read through copies in {tmp_path}/kd-cache, at most 10.0 GB" in said
    monkeypatch.setenv("LOCAL_RANK", "1")
    open_source(url)
    assert len(caplog.records) == 1


def test_a_folder_is_not_kept_twice(spec, tmp_path):
    write_cache(str(tmp_path / "c"), spec)
    with pytest.raises(ConfigError, match="it applies to servers and buckets only"):
        staged(str(tmp_path / "c"), tmp_path)
