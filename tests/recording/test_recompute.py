"""`verify --recompute` covers all seeds and shards, and refuses a seed of another teacher."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.builds import record_toy
from support.caches import make_spec
from support.command import kd_cache

from cache_service.recording.comparison import recompute, spread_views
from cache_service.rows.reader import Cache, open_cache
from cache_service.rows.writer import create_cache
from cache_service.storage import open_storage

COMMITS = {seed: [0, 1, 2] for seed in range(3)}


@pytest.mark.parametrize("num_views", [3, 7, 100, 252])
def test_views_are_divided_over_all_seeds(num_views):
    chosen = spread_views(make_spec(num_samples=84), COMMITS, num_views)
    assert list(chosen) == [0, 1, 2]
    counts = [len(positions) for positions in chosen.values()]
    assert sum(counts) == num_views
    assert max(counts) - min(counts) <= 1
    for positions in chosen.values():
        assert (np.diff(positions) > 0).all()
        assert 0 <= positions.min() <= positions.max() < 84


def test_as_many_views_as_shards_reach_every_shard():
    chosen = spread_views(make_spec(num_samples=96), COMMITS, 9)
    for positions in chosen.values():
        assert (positions // 32).tolist() == [0, 1, 2]


def test_one_view_of_each_seed_reaches_other_shards_in_other_seeds():
    chosen = spread_views(make_spec(num_samples=96), COMMITS, 3)
    assert [int(positions[0]) // 32 for positions in chosen.values()] == [0, 1, 2]


def test_more_views_than_samples_are_taken_from_several_seeds_and_none_twice():
    chosen = spread_views(make_spec(num_samples=96), COMMITS, 10_000)
    for positions in chosen.values():
        assert positions.tolist() == list(range(96))


def test_what_a_half_recorded_seed_lacks_is_asked_of_the_others():
    chosen = spread_views(make_spec(num_samples=84), {0: [2], 5: [0, 1, 2]}, 84)
    assert chosen[0].tolist() == list(range(64, 84))
    assert len(chosen[5]) == 64


def copy_with(cache: Cache, url: str, seed: int, factor: float) -> Cache:
    """A copy of a cache with the logits of one seed multiplied, intact in every byte."""
    writer = create_cache(
        open_storage(url),
        cache.spec,
        num_seeds=cache.num_seeds(),
        versions=cache.versions,
        provenance=cache.group.provenance,
    )
    for each, shards in cache.commits().items():
        for shard in shards:
            rows = dict(cache.read(each, *cache.spec.shard_range(shard)))
            if each == seed:
                name = "logits" if "logits" in rows else "values"
                rows[name] = (rows[name] * factor).astype(rows[name].dtype)
            writer.write_shard(each, shard, rows, cache.witnesses(each, shard), cache.versions)
    return open_cache(url)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record_toy(str(tmp_path_factory.mktemp("recompute") / "c"), seeds="0:3")


def test_a_whole_cache_of_this_teacher_is_accepted(recorded):
    comparison = recompute(recorded, 10_000)
    assert comparison.accepted
    assert (comparison.num_views, comparison.views_equal) == (288, 288)
    assert (comparison.num_seeds, comparison.num_shards) == (3, 9)
    assert max(comparison.relative_error.values()) < 0.001


def test_fewer_recorded_views_than_requested_are_stated(recorded):
    ended = kd_cache("verify", recorded.url, "--recompute", "300")
    assert ended.code == 0
    assert "300 views were requested, but only 288 are recorded: all of them" in ended.out


@pytest.mark.parametrize("factor", [-1.0, 0.8], ids=["other-classes", "same-classes"])
@pytest.mark.parametrize("seed", [1, 2])
def test_one_seed_with_the_logits_of_another_teacher_is_refused_by_name(
    recorded, tmp_path, factor, seed
):
    copy = copy_with(recorded, str(tmp_path / "c"), seed, factor)
    comparison = recompute(copy, 12)
    assert not comparison.accepted
    assert comparison.other_seeds == [seed]
    ended = kd_cache("verify", copy.url, "--recompute", "12")
    assert ended.code == 3
    assert f"the stored logits of seeds {seed}:{seed + 1} are not those" in ended.out
    document = json.loads(kd_cache("verify", copy.url, "--recompute", "12", "--json").out)
    assert (document["accepted"], document["recompute"]["num_views"]) == (False, 12)


@pytest.mark.parametrize("kind", ["int8", "topk", "features"])
def test_what_a_codec_drops_does_not_count_as_another_teacher(tmp_path, kind):
    codec = {"kind": kind} | ({"k": 3} if kind == "topk" else {})
    cache = record_toy(str(tmp_path / "c"), seeds="0:1", codec=codec)
    comparison = recompute(cache, 40)
    assert comparison.accepted, comparison
    if kind == "topk":
        assert not recompute(copy_with(cache, str(tmp_path / "d"), 0, 0.8), 40).accepted
