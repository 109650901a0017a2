"""`verify` accounts for every object that a writer makes."""

from __future__ import annotations

import json
import shutil

import pytest
from support.caches import make_spec, open_writer, write_cache
from support.command import kd_cache
from support.damage import changed
from support.everything import files_of

from cache_service.errors import KdCacheError
from cache_service.rows.reader import open_cache
from cache_service.rows.verify import drop_damaged_commits, verify_cache

CODECS = {
    "dense": {"kind": "dense"},
    "topk-zstd": {"kind": "topk", "k": 4, "compression": "zstd"},
    "features": {"kind": "features", "num_channels": 6},
}
SEEDS = range(2)


@pytest.fixture(params=CODECS.values(), ids=CODECS.keys())
def recorded(request, tmp_path):
    """A folder with two whole seeds of three shards, and its spec."""
    spec = make_spec(codec=request.param, num_samples=40, shard_rows=16)
    write_cache(str(tmp_path), spec, SEEDS)
    return tmp_path, spec


def is_accepted(root) -> bool:
    """Whether `verify` ends with 0: it opens, nothing is damaged, no shard is missing."""
    try:
        report = verify_cache(open_cache(str(root)))
    except KdCacheError:
        return False
    return report.is_intact and bool(report.complete) and not report.incomplete


def test_a_whole_cache_is_accepted(recorded):
    root, _ = recorded
    report = verify_cache(open_cache(str(root)))
    assert (report.shards_checked, report.rows_checked, report.complete) == (6, 80, [0, 1])
    assert report.second_opinion > 0
    assert is_accepted(root)


def test_no_object_may_be_lost_emptied_or_changed(recorded):
    root, _ = recorded
    for path in files_of(root):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for now in (None, b"", content[:-1], content + b"\0", bytes(flipped)):
            with changed(path, now):
                assert not is_accepted(root), path
    assert is_accepted(root)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_that_lost_all_its_commits_is_incomplete_also_the_first_one(recorded, seed):
    root, spec = recorded
    shutil.rmtree(root / f"commits/{seed}")
    assert verify_cache(open_cache(str(root))).incomplete == {seed: spec.num_shards}


def test_a_cache_that_begins_at_a_later_seed_is_whole(tmp_path):
    write_cache(str(tmp_path), make_spec(), range(3, 5))
    report = verify_cache(open_cache(str(tmp_path)))
    assert (report.complete, report.incomplete) == ([3, 4], {})


def test_a_document_with_another_number_of_seeds_is_damage_and_a_build_heals_it(recorded):
    root, spec = recorded
    path = root / "digest/zarr.json"
    document = json.loads(path.read_bytes())
    for length in (1, 5):
        document["shape"][0] = length
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        with changed(path, text.encode()):
            report = verify_cache(open_cache(str(root)))
            assert [key for key, _ in report.damaged_metadata] == ["digest/zarr.json"]
            assert f"describes {length} seeds, not 2" in report.damaged_metadata[0][1]
            open_writer(str(root), spec, len(SEEDS))
            assert verify_cache(open_cache(str(root))).damaged_metadata == []


def test_a_cache_whose_arrays_are_too_short_for_its_commits_is_damaged(tmp_path):
    spec = make_spec(num_samples=40)
    write_cache(str(tmp_path / "one"), spec, range(1))
    write_cache(str(tmp_path / "two"), spec, range(2))
    for path in (tmp_path / "one").glob("*/zarr.json"):
        shutil.copyfile(path, tmp_path / "two" / path.relative_to(tmp_path / "one"))
    report = verify_cache(open_cache(str(tmp_path / "two")))
    assert len(report.damaged_metadata) == 5
    open_writer(str(tmp_path / "two"), spec, 2)
    assert is_accepted(tmp_path / "two")


def test_a_lost_document_of_the_commits_is_named_and_exit_3(recorded):
    root, spec = recorded
    (root / "commits/zarr.json").unlink()
    ended = kd_cache("verify", str(root))
    assert ended.code == 3
    assert "commits/zarr.json is missing" in ended.out
    assert "kd-cache build" in ended.out
    open_writer(str(root), spec, len(SEEDS))
    assert kd_cache("verify", str(root)).code == 0


def test_only_the_commits_of_damaged_shards_are_dropped(recorded):
    root, _ = recorded
    (root / "sample/c/1/2").unlink()
    cache = open_cache(str(root))
    report = verify_cache(cache)
    assert [damage[:2] for damage in report.damaged] == [(1, 2)]
    assert drop_damaged_commits(cache, report) == 1
    assert cache.commits() == {0: [0, 1, 2], 1: [0, 1]}
