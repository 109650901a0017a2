"""What `plan` predicts of a build: bytes, objects, time, and what a kill can cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.builds import open_toy, run_build

from cache_service.recording.plan import make_plan, recording_rate


def stored(folder):
    """Bytes and number of a cache's objects below its arrays, with the commits."""
    files = [
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != "zarr.json" and ".scratch" not in path.parts
    ]
    return sum(path.stat().st_size for path in files), len(files)


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": {"shard_rows": 256, "chunk_rows": 64}},
        {"layout": {"shard_rows": 512, "chunk_rows": 512}},  # the last chunk is padded
        {"layout": None, "codec": {"kind": "int8"}},
    ],
    ids=["chunks", "padded", "int8 in the default layout"],
)
def test_planned_bytes_and_objects_are_those_that_a_build_writes(tmp_path, changes):
    build = open_toy(str(tmp_path / "c"), dataset__args={"num_samples": 1000}, **changes)
    plan = make_plan(build)
    assert not (tmp_path / "c").exists()
    run_build(build)
    num_bytes, objects = stored(tmp_path / "c")
    assert plan.objects == objects
    assert plan.bytes_total == pytest.approx(num_bytes, rel=0.01)


def test_rendering_and_teacher_take_turns_without_rendering_processes():
    assert recording_rate(300.0, 600.0, workers=0, cores=8) == pytest.approx(200.0)


@pytest.mark.parametrize(
    ("workers", "cores", "rate"), [(1, 8, 300.0), (2, 8, 600.0), (4, 8, 1000.0), (4, 2, 600.0)]
)
def test_rendering_processes_hide_the_faster_part(workers, cores, rate):
    assert recording_rate(300.0, 1000.0, workers=workers, cores=cores) == pytest.approx(rate)


def test_a_kill_costs_two_shards_or_what_is_left(tmp_path):
    build = open_toy(str(tmp_path / "c"))
    plan = make_plan(build)
    assert plan.kill_s == pytest.approx(plan.wall_s * 64 / 192)
    run_build(build, seeds=(0,))
    left = make_plan(build)
    assert left.rows_pending == 96
    assert left.kill_s == pytest.approx(left.wall_s * 64 / 96)
