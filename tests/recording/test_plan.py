"""What `plan` predicts of a build: bytes, objects, time, and what a kill can cost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support import s3
from support.builds import open_toy, run_build
from support.ordered import epoch_in_batches
from support.origin import serving

from cache_service.errors import StorageError
from cache_service.format.layout import CacheLayout
from cache_service.recording.engines import prepare, run_local
from cache_service.recording.plan import head_bytes, make_plan
from cache_service.recording.rates import (
    WRITTEN_BYTES,
    Machine,
    ViewCost,
    measure_storage,
    recording_rate,
    workers_for,
)
from cache_service.remote import prefetch
from cache_service.remote.cache import open_remote
from cache_service.remote.source import DiskSettings, open_source
from cache_service.storage.disk import DiskCache
from cache_service.storage.local import LocalStorage
from cli.build_commands import _plan_text


def stored(folder):
    """Bytes and number of a cache's objects below its arrays, with the commits."""
    files = [
        path
        for path in Path(folder).rglob("*")
        if path.is_file() and path.name != "zarr.json" and ".scratch" not in path.parts
    ]
    return sum(path.stat().st_size for path in files), len(files)


CHUNKS = {"shard_rows": 256, "chunk_rows": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"layout": CHUNKS},
        {"layout": {"shard_rows": 512, "chunk_rows": 512}},  # the last chunk is padded
        {"layout": None, "codec": {"kind": "int8"}},
        {"layout": CHUNKS, "codec": {"kind": "topk", "k": 3}},
        {"layout": CHUNKS, "codec": {"kind": "topk", "k": 3, "packed": True}},
        {"layout": CHUNKS, "codec": {"kind": "features"}},  # and the head, once
    ],
    ids=["chunks", "padded", "int8 in the default layout", "topk", "packed", "features"],
)
def test_planned_bytes_and_objects_are_those_that_a_build_writes(tmp_path, changes):
    build = open_toy(str(tmp_path / "c"), dataset__args={"num_samples": 1000}, **changes)
    plan = make_plan(build)
    assert not list(tmp_path.iterdir())
    run_build(build)
    num_bytes, objects = stored(tmp_path / "c")
    assert plan.objects == objects
    assert plan.bytes_total == pytest.approx(num_bytes, rel=0.01)
    heads = [path for path in (tmp_path / "c").glob("head_*/c/**/*") if path.is_file()]
    assert head_bytes(CacheLayout(build.spec)) == sum(path.stat().st_size for path in heads)
    assert "bytes        at most" not in _plan_text(plan)


@pytest.mark.parametrize("codec", [{"kind": "dense"}, {"kind": "topk", "k": 3}], ids=str)
def test_bytes_of_compressed_rows_are_planned_as_an_upper_limit(tmp_path, codec):
    codec = codec | {"compression": "zstd"}
    build = open_toy(
        str(tmp_path / "c"), dataset__args={"num_samples": 1000}, codec=codec, layout=CHUNKS
    )
    plan = make_plan(build)
    run_build(build)
    num_bytes, objects = stored(tmp_path / "c")
    assert plan.objects == objects
    assert num_bytes < plan.bytes_total
    assert "bytes        at most" in _plan_text(plan)


COST = ViewCost(1 / 300, 1 / 1000, 1e-9, 0.0, 0.0, None)
GPU = Machine(cores=8, gpus=1, threads=1)


def rate(cost=COST, machine=GPU, **settings):
    per_s, limit = recording_rate(cost, machine, **settings)
    return round(per_s), limit


def test_rendering_and_teacher_take_turns_without_rendering_processes():
    found = rate(COST._replace(answer_s=1 / 600), workers=0)
    assert found == (200, "rendering and teacher in turn")


@pytest.mark.parametrize(
    ("workers", "cores", "found"),
    [
        (1, 8, (300, "rendering")),
        (2, 8, (600, "rendering")),
        (4, 8, (1000, "teacher")),
        (4, 2, (600, "CPU cores")),
    ],
)
def test_rendering_processes_hide_the_faster_part(workers, cores, found):
    assert rate(machine=GPU._replace(cores=cores), workers=workers) == found


def test_a_teacher_on_the_cpu_takes_cores_from_rendering():
    cost = ViewCost(1 / 300, 1 / 300, 1e-9, 0.0, 0.0, None)
    assert rate(cost, Machine(3, 0, 1), workers=1) == (300, "rendering")
    assert rate(cost, Machine(2, 0, 2), workers=1) == (200, "CPU cores")
    assert rate(cost, Machine(1, 0, 1), workers=1) == (150, "CPU cores")


def test_processes_share_the_gpus_and_the_storage():
    cost = ViewCost(1 / 10_000, 1 / 100, 1e-9, 1 / 350, 0.0, None)
    machine = Machine(cores=64, gpus=2, threads=1)
    assert rate(cost, machine, workers=1) == (100, "teacher")
    assert rate(cost, machine, workers=1, processes=2) == (200, "teacher")
    assert rate(cost, machine, workers=1, processes=8) == (200, "teacher")
    machine = machine._replace(gpus=8)
    assert rate(cost, machine, workers=1, processes=8) == (350, "storage")


def test_slow_encoding_limits_a_fast_teacher():
    assert rate(COST._replace(encode_s=1 / 250), workers=8) == (250, "encoding")


def test_the_workers_that_keep_a_teacher_busy():
    assert workers_for(COST) == 4  # 300 views/s each, for 1,000
    assert workers_for(COST._replace(render_s=1 / 2000)) == 1
    assert workers_for(COST._replace(write_s=1 / 500)) == 2


def test_a_kill_costs_two_shards_or_what_is_left(tmp_path):
    build = open_toy(str(tmp_path / "c"))
    plan = make_plan(build)
    assert plan.kill_s == pytest.approx(plan.wall_s * 64 / 192)
    run_build(build, seeds=(0,))
    left = make_plan(build)
    assert left.rows_pending == 96
    assert left.kill_s == pytest.approx(left.wall_s * 64 / 96)


def test_the_storage_is_measured_where_the_cache_will_be_and_left_as_it_was(tmp_path, monkeypatch):
    written = []
    put = LocalStorage.put

    def watched(storage, key, content):
        written.append((Path(storage.url).parent, len(content)))
        put(storage, key, content)

    monkeypatch.setattr(LocalStorage, "put", watched)
    (tmp_path / "caches").mkdir()
    cost = measure_storage(str(tmp_path / "caches" / "new" / "c"))
    assert {folder for folder, _ in written} == {tmp_path / "caches"}
    assert max(size for _, size in written) == WRITTEN_BYTES
    assert cost.object_s > 0
    assert cost.byte_s > 0
    assert not list((tmp_path / "caches").iterdir())


def test_a_failed_measurement_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise StorageError("cannot write.")

    monkeypatch.setattr(LocalStorage, "put", fail)
    with pytest.raises(StorageError):
        measure_storage(str(tmp_path / "c"))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(StorageError, match=rf"cannot write into {tmp_path}: Permission denied"):
        measure_storage(str(tmp_path / "c"))


def test_a_complete_cache_is_not_written_to(tmp_path):
    build = open_toy(str(tmp_path / "c"), seeds="0:1")
    run_build(build)
    plan = make_plan(build)
    assert (plan.write_rows_per_s, plan.wall_s) == (None, 0.0)


def test_planned_requests_of_a_bucket_are_those_that_an_epoch_makes(tmp_path, monkeypatch):
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    build = open_toy(s3.new_prefix(), seeds="0:1")
    run_build(build)
    with s3.counted_bucket(monkeypatch) as bucket:
        cache = open_source(build.config.cache, disk=DiskSettings(str(tmp_path)))
        bucket.asked.clear()
        epoch_in_batches(cache, 0, 20)
        assert len(bucket.asked) == make_plan(build).bucket_requests


@pytest.mark.parametrize(("rows", "requests"), [(32, 3), (20, 6)], ids=["a shard", "less"])
def test_planned_requests_of_a_server_are_those_that_an_epoch_makes(
    tmp_path, monkeypatch, rows, requests
):
    monkeypatch.setattr(prefetch, "MAX_REQUEST_ROWS", rows)
    build = open_toy(str(tmp_path / "c"), seeds="0:1")
    run_build(build)
    with serving(tmp_path) as origin:
        cache = open_remote(origin.url("c"), disk=DiskCache(str(tmp_path / "disk"), 10**9))
        epoch_in_batches(cache, 0, 7)
        assert len(origin.targets("/rows")) == make_plan(build).server_requests == requests


def test_no_memory_of_a_gpu_is_made_up_on_a_cpu(tmp_path):
    plan = make_plan(open_toy(str(tmp_path / "c")))
    assert plan.device_bytes is None
    assert plan.memory_bytes > 50e6


def seconds_from_the_first_answer(build):
    """Of recording one seed."""
    started: list[float] = []
    prepare(build)
    run_local(
        build, seeds=(0,), on_progress=lambda _: started or started.append(time.perf_counter())
    )
    return time.perf_counter() - started[0]


def test_a_build_of_slow_images_and_a_slow_teacher_takes_the_planned_time(tmp_path):
    """Both wait instead of computing, so that other work on the machine hardly disturbs them."""
    build = open_toy(
        str(tmp_path / "c"),
        dataset={"name": "support.slow:slow_patches", "args": {"num_samples": 96}},
        teacher={"model": "support.slow:slow_net", "allow_untrained": True},
        seeds="0:1",
    )
    plan = make_plan(build)
    assert plan.limit == "rendering and teacher in turn"
    planned = plan.wall_s * (96 - 16) / 96  # the clock starts after a batch
    assert planned == pytest.approx(seconds_from_the_first_answer(build), rel=0.2)


@pytest.mark.slow  # and on a quiet machine
@pytest.mark.parametrize(
    "codec", [{"kind": "dense"}, {"kind": "topk", "k": 3}], ids=lambda c: c["kind"]
)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_build_takes_the_planned_time(tmp_path, codec, workers):
    ratios = []
    for attempt in range(3):
        build = open_toy(
            str(tmp_path / f"c{attempt}"),
            dataset__args={"num_samples": 2048},
            teacher={"model": "resnet20", "num_classes": 10, "allow_untrained": True},
            augment={"preset": "cifar", "size": 32},
            scales=[1],
            layout={"shard_rows": 512, "chunk_rows": 64},
            batch_size=64,
            seeds="0:1",
            codec=codec,
            workers=workers,
        )
        planned = make_plan(build).wall_s * (2048 - 64) / 2048
        ratios.append(planned / seconds_from_the_first_answer(build))
    assert any(1 / 1.2 < ratio < 1.2 for ratio in ratios), ratios
