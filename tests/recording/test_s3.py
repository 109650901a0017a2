"""A bucket is a folder: the same keys, bytes and refusals, read by the same tools."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from support import s3
from support.builds import open_toy, record_toy, tree_bytes
from support.toys import Patches

from cache_service.errors import CorruptError
from cache_service.recording.plan import make_plan
from cache_service.recording.record import open_writer, record
from cache_service.rows.reader import open_cache
from cache_service.storage import open_storage
from distill import CachedDataset, load_cache


@pytest.fixture
def url(monkeypatch):
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    return s3.new_prefix()


def test_a_build_into_a_bucket_writes_what_a_build_into_a_folder_writes(tmp_path, url):
    record_toy(str(tmp_path / "c"), seeds="0:1")
    cache = record_toy(url, seeds="0:1")
    storage = open_storage(url)
    keys = storage.list("")
    assert {key: storage.get(key) for key in keys} == tree_bytes(tmp_path / "c")
    local = open_cache(str(tmp_path / "c"))
    for name, values in local.read(0, 10, 80).items():
        np.testing.assert_array_equal(cache.read(0, 10, 80)[name], values)


def test_a_student_trains_from_a_bucket_and_damage_there_is_refused(url, tmp_path):
    record_toy(url, seeds="0:1", scales=[1])
    kept = {"disk_cache": str(tmp_path)}
    data = CachedDataset(load_cache(url, **kept), images=Patches(num_samples=96), seed=0)
    items = data.__getitems__(list(range(96)))
    assert len(items) == 96
    storage = open_storage(url)
    key = "logits/c/0/1/0/0"
    content = bytearray(storage.get(key))
    content[50] ^= 4
    storage.put(key, bytes(content))
    # What this machine read before is still whole; one that did not read it finds the damage.
    again = CachedDataset(load_cache(url, **kept), images=Patches(num_samples=96), seed=0)
    assert len(again.__getitems__(list(range(96)))) == 96
    fresh = CachedDataset(load_cache(url, disk_cache_bytes=0), images=Patches(96), seed=0)
    with pytest.raises(CorruptError, match="logits/c/0/1"):
        fresh.__getitems__(list(range(96)))


def test_random_order_over_a_bucket_is_warned_about_once_and_order_is_not(url):
    record_toy(url, seeds="0:1", scales=[1])
    data = CachedDataset(load_cache(url, disk_cache_bytes=0), images=Patches(96), seed=0)
    data.__getitems__(list(range(30)))
    with pytest.warns(UserWarning, match="is read in random order.*shuffle=False") as said:
        data.__getitems__([5, 80, 3])
    data.__getitems__([7, 2])
    assert len(said) == 1


def test_random_order_is_not_warned_about_where_the_epoch_is_kept_on_disk(url, tmp_path, recwarn):
    recorded = record_toy(url, seeds="0:1", scales=[1])
    epoch = sum(map(recorded.layout.row_object_bytes, range(3)))
    for max_bytes, warned in ((epoch, 0), (epoch - 1, 1)):
        cache = load_cache(url, disk_cache=str(tmp_path), disk_cache_bytes=max_bytes)
        CachedDataset(cache, images=Patches(96), seed=0).__getitems__([5, 80, 3])
        assert len([each for each in recwarn if "random order" in str(each.message)]) == warned


def test_zarr_python_opens_the_bucket_over_obstore(url):
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    cache = record_toy(url, seeds="0:1")
    group = zarr.open_group(ObjectStore(from_url(url), read_only=True), mode="r")
    np.testing.assert_array_equal(group["logits"][0], cache.read(0, 0, 96)["logits"])


def test_plan_and_build_list_the_commits_and_ask_for_no_shard(url, monkeypatch):
    record_toy(url, scales=[1])
    with s3.counted_bucket(monkeypatch) as bucket:
        build = open_toy(url, scales=[1])
        plan = make_plan(build)
        asked = bucket.by_kind()
        assert plan.rows_pending == 0
        record(build, open_writer(build), seeds=build.config.seeds)
    # Both look at what is recorded to check the teacher, by one more listing.
    assert (asked["LIST"], asked["HEAD"]) == (2, 0)
    assert bucket.by_kind()["LIST"] == 3
    assert bucket.by_kind()["HEAD"] == 0
