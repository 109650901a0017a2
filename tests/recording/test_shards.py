"""The order of the shards may change while a build runs; their bytes may not."""

from __future__ import annotations

import pytest
from support.builds import open_toy, record_toy, tree_bytes

from cache_service.recording.engines import prepare
from cache_service.recording.record import open_writer, record
from cache_service.recording.shards import Shard, ShardOrder, all_shards
from cache_service.rows.writer import CacheWriter

PLANNED = [Shard(seed, shard) for seed in range(2) for shard in range(3)]


def test_shards_come_as_planned_where_nobody_waits():
    assert list(ShardOrder().through(PLANNED)) == PLANNED


def test_awaited_shards_come_first_in_the_order_of_asking_and_each_once():
    order = ShardOrder()
    for shard in [Shard(1, 2), Shard(0, 1), Shard(1, 2)]:
        order.prioritize(shard)
    assert list(order.through(PLANNED)) == [(1, 2), (0, 1), (0, 0), (0, 2), (1, 0), (1, 1)]


def test_a_shard_can_be_moved_at_any_time_until_it_is_taken():
    order = ShardOrder()
    taken = []
    for shard in order.through(PLANNED):
        taken.append(shard)
        if len(taken) == 2:
            order.prioritize(Shard(1, 1))
        if len(taken) == 4:
            order.prioritize(Shard(1, 1))  # taken already
            order.prioritize(Shard(7, 7))  # of another plan
    assert taken == [(0, 0), (0, 1), (1, 1), (0, 2), (1, 0), (1, 2)]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.faults)])
def test_a_steered_build_records_the_awaited_shard_next_and_the_same_bytes(
    tmp_path, monkeypatch, workers
):
    sizes = {"seeds": "0:3", "workers": workers}
    record_toy(str(tmp_path / "planned"), **sizes)
    build, order, written = open_toy(str(tmp_path / "steered"), **sizes), ShardOrder(), []
    prepare(build)
    last = all_shards(build.spec, build.config.seeds)[-1]
    write_shard = CacheWriter.write_shard

    def noted(self, seed, shard, *rest):
        written.append((seed, shard))
        if len(written) == 1:
            order.prioritize(last)
        return write_shard(self, seed, shard, *rest)

    monkeypatch.setattr(CacheWriter, "write_shard", noted)
    record(build, open_writer(build), seeds=build.config.seeds, order=order)
    assert written.index(last) <= 4  # a few are rendered ahead
    assert len(written) == len(set(written)) == 9
    assert tree_bytes(tmp_path / "steered") == tree_bytes(tmp_path / "planned")
