"""Builders that die, hang, race or run on a cluster leave the cache of one undisturbed builder."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support.builds import open_toy, record_toy, run_build, tree_bytes

from cache_service.errors import KdCacheError
from cache_service.recording.engines import prepare, run_local
from cache_service.recording.record import open_writer, record
from cache_service.rows.reader import open_cache

SIZES = {
    "dataset": {"name": "support.toys:patches", "args": {"num_samples": 640}},
    "seeds": "0:3",
}


def _holders() -> list[tuple[psutil.Process, set[str]]]:
    """Builder processes below this one, with the locks of the shards that they are at."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            locks = {file.path for file in child.open_files() if file.path.endswith(".lock")}
            if locks:
                found.append((child, locks))
    return found


def _disturb(number: int, times: int, stop: threading.Event, killed: list[int]) -> None:
    # At its third shard a builder has told of its first. One that dies before that, four times in a
    # row, is rightly given up, and one that hangs before gets ten minutes.
    shards: dict[int, set[str]] = defaultdict(set)
    while len(killed) < times and not stop.wait(0.05):
        for child, locks in _holders():
            shards[child.pid] |= locks
            if len(shards[child.pid]) > 2 and child.pid not in killed:
                child.send_signal(number)
                killed.append(child.pid)
                break


@pytest.mark.parametrize(
    ("number", "times"),
    [
        (signal.SIGKILL, 2),
        (signal.SIGSTOP, 1),
        pytest.param(signal.SIGKILL, 10, marks=pytest.mark.faults),
    ],
)
@pytest.mark.timeout(240)
def test_builders_that_die_or_hang_are_replaced_and_every_shard_is_there_once(
    tmp_path, number, times
):
    # Long enough that the builders are still at it when the last of them is killed or stopped.
    sizes = SIZES | {"seeds": f"0:{2 + times}"}
    record_toy(str(tmp_path / "whole"), **sizes)
    build = open_toy(str(tmp_path / "c"), **sizes, processes=2, stall_s=8.0)
    stop, killed = threading.Event(), []
    disturber = threading.Thread(target=_disturb, args=(number, times, stop, killed))
    disturber.start()
    try:
        run_build(build)
    finally:
        stop.set()
        disturber.join()
    assert len(killed) == times
    assert tree_bytes(tmp_path / "c") == tree_bytes(tmp_path / "whole")


def _race(cache: str, gate: object, results: object) -> None:
    build = open_toy(cache, seeds="0:1", layout={"shard_rows": 96, "chunk_rows": 8})
    writer = open_writer(build)
    gate.wait()
    try:
        results.put(record(build, writer, seeds=(0,)))
    except KdCacheError as refusal:
        results.put(repr(refusal))


@pytest.mark.parametrize(
    ("processes", "rounds"), [(4, 2), pytest.param(12, 40, marks=pytest.mark.faults)]
)
@pytest.mark.timeout(900)
def test_builders_of_one_shard_commit_it_exactly_once_and_all_end_clean(
    tmp_path, processes, rounds
):
    sizes = {"seeds": "0:1", "layout": {"shard_rows": 96, "chunk_rows": 8}}
    record_toy(str(tmp_path / "whole"), **sizes)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.builds"])
    for turn in range(rounds):
        cache = str(tmp_path / f"c{turn}")
        prepare(open_toy(cache, **sizes))
        gate, results = context.Barrier(processes), context.Queue()
        racers = [
            context.Process(target=_race, args=(cache, gate, results)) for _ in range(processes)
        ]
        for each in racers:
            each.start()
        committed = [results.get(timeout=120) for _ in racers]
        for each in racers:
            each.join()
        assert [each.exitcode for each in racers] == [0] * processes
        assert sorted(committed) == [0] * (processes - 1) + [1]
        assert tree_bytes(Path(cache)) == tree_bytes(tmp_path / "whole")


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.faults)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_worker_counts_give_the_same_bytes(tmp_path, workers):
    record_toy(str(tmp_path / "inline"))
    record_toy(str(tmp_path / "workers"), workers=workers)
    assert tree_bytes(tmp_path / "inline") == tree_bytes(tmp_path / "workers")


@pytest.mark.parametrize("batch_size", [64])
def test_batch_sizes_give_the_same_views_and_answers_to_the_last_bits(tmp_path, batch_size):
    one = record_toy(str(tmp_path / "a"), batch_size=16).read(0, 0, 96)
    other = record_toy(str(tmp_path / "b"), batch_size=batch_size).read(0, 0, 96)
    for name in ("sample", "digest", "origin"):
        assert (one[name] == other[name]).all()
    difference = abs(one["logits"].astype("f4") - other["logits"].astype("f4")).max()
    assert difference <= 1e-2
    assert (one["logits"].argmax(-1) == other["logits"].argmax(-1)).mean() >= 0.999


def test_a_builder_that_refuses_stops_the_pool_with_its_reason(tmp_path):
    build = open_toy(
        str(tmp_path / "c"), processes=2, scales=[1], teacher__model_args={"scale": 1e7}
    )
    prepare(build)
    with pytest.raises(KdCacheError, match="the teacher answered NaN"):
        run_local(build, seeds=(0, 1))
    assert open_cache(str(tmp_path / "c")).commits() == {}
    assert not (tmp_path / "c" / ".scratch").exists()
