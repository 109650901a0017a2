"""The layout of a build file that states none: that of the cache, else the default."""

from __future__ import annotations

import re
import shlex

import pytest
from support.builds import open_toy, record_toy, run_build, tree_bytes
from support.caches import make_spec

from cache_service.errors import NotACacheError, SpecMismatchError
from cache_service.format.spec import Layout
from cache_service.recording import plan
from cache_service.recording.engines import run_local
from cache_service.recording.plan import describe_long_shards, make_plan
from cache_service.rows.verify import verify_cache

SIZES = {"dataset__args": {"num_samples": 1100}, "batch_size": 256}

EARLIER = {"shard_rows": 2048, "chunk_rows": 2048}
"""What earlier versions chose for 1,100 samples with rows of this size: one shard a seed."""


def test_a_new_cache_has_shards_for_several_builders(tmp_path):
    build = open_toy(str(tmp_path / "c"), layout=None, **SIZES)
    assert build.spec.layout == Layout(shard_rows=512, chunk_rows=512)
    assert build.spec.num_shards == 3


def test_a_file_without_a_layout_goes_on_in_a_cache_of_an_earlier_default(tmp_path):
    path = str(tmp_path / "c")
    record_toy(str(tmp_path / "whole"), seeds="0:3", layout=EARLIER, **SIZES)
    recorded = record_toy(path, seeds="0:1", layout=EARLIER, **SIZES)
    build = open_toy(path, seeds="0:3", layout=None, **SIZES)
    assert build.spec.fingerprint == recorded.fingerprint
    assert make_plan(build).rows_pending == 2 * 1100
    cache = run_build(build)
    assert cache.complete_seeds() == [0, 1, 2]
    assert verify_cache(cache).is_intact
    assert tree_bytes(tmp_path / "c") == tree_bytes(tmp_path / "whole")
    assert run_local(build, seeds=build.config.seeds) == 0


def test_a_stated_layout_is_never_replaced_by_that_of_the_cache(tmp_path):
    record_toy(str(tmp_path / "c"), seeds="0:1", layout=EARLIER, **SIZES)
    stated = open_toy(str(tmp_path / "c"), layout={"shard_rows": 512, "chunk_rows": 512}, **SIZES)
    with pytest.raises(SpecMismatchError, match="layout"):
        run_build(stated)


def test_another_codec_is_refused_for_the_codec_not_for_the_layout(tmp_path):
    record_toy(str(tmp_path / "c"), seeds="0:1", layout=EARLIER, **SIZES)
    other = open_toy(str(tmp_path / "c"), layout=None, codec={"kind": "int8"}, **SIZES)
    with pytest.raises(SpecMismatchError, match="codec"):
        run_build(other)


def test_something_else_at_the_path_is_refused_before_anything_is_recorded(tmp_path):
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    with pytest.raises(NotACacheError, match="not one that kd-cache wrote"):
        open_toy(str(tmp_path), layout=None)


@pytest.mark.parametrize("rate", [0.01, 0.5, 3.0, 40.0, 270.0])
def test_the_layout_to_type_makes_shards_of_at_most_two_minutes(rate):
    layout = {"num_samples": 10**6, "shard_rows": 1 << 15, "chunk_rows": 256}
    advice = describe_long_shards(make_spec(**layout), rate)
    typed = dict(re.findall(r"--set layout\.(\w+)=(\d+)", shlex.join(shlex.split(advice))))
    again = {name: int(rows) for name, rows in typed.items()}
    assert describe_long_shards(make_spec(num_samples=10**6, **again), rate) == ""
    assert again["shard_rows"] > 60 * rate or again["shard_rows"] == 2


def test_shards_of_two_minutes_or_of_few_samples_need_no_advice():
    whole = make_spec(num_samples=10**6, shard_rows=1 << 15, chunk_rows=256)
    assert describe_long_shards(whole, 274.0) == ""
    assert describe_long_shards(whole, 272.0) != ""
    assert describe_long_shards(make_spec(num_samples=50, shard_rows=1 << 15), 1.0) == ""


def test_a_plan_tells_of_long_shards_only_while_the_layout_can_be_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "MAX_SHARD_S", 1e-4)
    build = open_toy(str(tmp_path / "c"))
    assert "--set layout.shard_rows=" in make_plan(build).long_shards
    run_build(build, seeds=(0,))
    assert make_plan(build).long_shards == ""
