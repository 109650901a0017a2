"""Builders that cannot exclude each other share the work all the same, to the same bytes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
from contextlib import suppress

import pytest
from support import s3
from support.builds import open_toy, record_toy, tree_bytes

from cache_service.recording.engines import prepare
from cache_service.recording.record import open_writer, record
from cache_service.recording.shards import SCATTER_WINDOW, Shard, ShardOrder
from cache_service.storage import open_storage

NUM_SHARDS = 36

SIZES = {
    # Opening an image takes longer than all else, so that a busy machine slows both builders.
    "dataset": {
        "name": "support.slow:slow_patches",
        "args": {"num_samples": 96, "delay_s": 0.01},
    },
    "layout": {"shard_rows": 8, "chunk_rows": 8},
    "batch_size": 8,
    "scales": [1],
    "seeds": "0:3",
}


def _no_locks(*_arguments: object) -> None:
    raise OSError(95, os.strerror(95))


def _locks_of_this_mount(*_arguments: object) -> None:
    """As where each builder has a mount of its own: the lock is given, and excludes nobody."""


LOCKS = {"none": _no_locks, "a mount each": _locks_of_this_mount}


def _build(cache: str, locks: str | None, environment: dict[str, str], gate, results) -> None:
    os.environ.update(environment)  # the fork server has that of its start
    if locks is not None:
        fcntl.flock = LOCKS[locks]
    build = open_toy(cache, **SIZES)
    writer = open_writer(build)
    seen = []
    gate.wait()
    committed = record(build, writer, seeds=build.config.seeds, on_progress=seen.append)
    results.put((committed, seen[-1], [progress.shards_done for progress in seen]))


def build_together(cache: str, *, locks: str | None) -> list:
    """Two builders of the whole at once: what each of them reports."""
    prepare(open_toy(cache, **SIZES))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.builds"])
    gate, results = context.Barrier(2), context.Queue()
    arguments = (cache, locks, dict(os.environ), gate, results)
    builders = [context.Process(target=_build, args=arguments) for _ in range(2)]
    for each in builders:
        each.start()
    found = [results.get(timeout=120) for _ in builders]
    for each in builders:
        each.join()
    assert [each.exitcode for each in builders] == [0, 0]
    return found


def check(found: list) -> None:
    committed = [each[0] for each in found]
    assert sum(committed) == NUM_SHARDS
    assert min(committed) >= NUM_SHARDS // 3, committed
    for _, last, done in found:
        assert last.shards_done == last.shards_total == NUM_SHARDS
        assert last.rows_done == last.rows_answered == last.rows_total == 3 * 96
        assert done == sorted(done)
        # The other's commits show while it works, not only at the end.
        assert len(set(done)) > NUM_SHARDS // 2


@pytest.mark.parametrize("locks", ["a mount each", pytest.param("none", marks=pytest.mark.faults)])
@pytest.mark.timeout(240)
def test_two_builders_of_a_folder_without_locks_share_the_work(tmp_path, locks):
    record_toy(str(tmp_path / "whole"), **SIZES)
    check(build_together(str(tmp_path / "c"), locks=locks))
    with suppress(FileNotFoundError):  # no locks, no sweep
        (tmp_path / "c" / ".scratch").rmdir()
    assert tree_bytes(tmp_path / "c") == tree_bytes(tmp_path / "whole")


@pytest.mark.timeout(240)
def test_two_builders_of_a_bucket_share_the_work_and_ask_for_each_shard_a_few_times(
    tmp_path, monkeypatch
):
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    record_toy(str(tmp_path / "whole"), **SIZES)
    url = s3.new_prefix()
    with s3.counted_bucket(monkeypatch) as bucket:
        check(build_together(url, locks=None))
    storage = open_storage(url)
    keys = storage.list("")
    assert {key: storage.get(key) for key in keys} == tree_bytes(tmp_path / "whole")
    asked = bucket.by_kind()
    assert asked["LIST"] <= 8
    assert asked["HEAD"] <= 2 * 4 * NUM_SHARDS


def test_scattered_shards_come_each_once_about_in_order_and_differently_in_each_builder():
    planned = [Shard(seed, shard) for seed in range(20) for shard in range(16)]
    orders = []
    for _ in range(2):
        order = ShardOrder()
        order.scatter()
        orders.append(list(order.through(planned)))
    assert sorted(orders[0]) == sorted(orders[1]) == planned
    assert sum(one == other for one, other in zip(*orders, strict=True)) < 40
    for place, shard in enumerate(orders[0]):
        assert planned.index(shard) < place + SCATTER_WINDOW


def test_awaited_shards_still_come_first_where_the_others_are_scattered():
    planned = [Shard(0, shard) for shard in range(100)]
    order = ShardOrder()
    order.scatter()
    order.prioritize(Shard(0, 99))
    assert next(iter(order.through(planned))) == Shard(0, 99)
