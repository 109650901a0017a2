"""A recording on a GPU has the views of one on the CPU, and nearly its logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.builds import open_toy, record_toy, run_build

from cache_service.recording.comparison import check_teacher
from cache_service.recording.plan import make_plan

CIFAR = {"preset": "cifar", "size": 16}
MODEL = {"model": "resnet8x4", "allow_untrained": True, "input_size": 16, "seed": 3}


pytestmark = pytest.mark.filterwarnings(
    "ignore:TensorFloat32 tensor cores:UserWarning"  # torch.compile advises what we rule out
)


def record(folder, name, *, device, **teacher):
    return record_toy(
        str(folder / name),
        augment=CIFAR,
        device=device,
        codec={"kind": "dense"},
        scales=[1, 2],
        teacher=MODEL | teacher,
        seeds="0:2",
    )


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    return record(tmp_path_factory.mktemp("cpu"), "cache", device="cpu")


@pytest.mark.parametrize(
    ("teacher", "bound"),
    [
        # Relative to the spread of the logits. Float16 storage alone rounds by up to 5e-4.
        ({"channels_last": False}, 2e-3),
        ({"channels_last": True}, 2e-3),
        ({"precision": "bfloat16"}, 5e-2),
        ({"precision": "float16"}, 1e-2),
        ({"compile": True}, 2e-3),
    ],
    ids=["contiguous", "channels last", "bfloat16", "float16", "compiled"],
)
def test_rows_of_a_gpu_are_those_of_the_cpu_within_the_bound(tmp_path, on_cpu, teacher, bound):
    on_gpu = record(tmp_path, "cache", device="cuda", **teacher)
    for seed in (0, 1):
        mine, theirs = on_gpu.read(seed, 0, 96), on_cpu.read(seed, 0, 96)
        for name in ("sample", "digest", "origin"):
            assert np.array_equal(mine[name], theirs[name]), name
        one, other = (rows["logits"].astype(np.float64) for rows in (mine, theirs))
        assert np.abs(one - other).max() / other.std() < bound


def test_a_recording_on_a_gpu_is_repeated_bit_for_bit_and_resumed(tmp_path):
    first = record(tmp_path, "first", device="cuda", precision="bfloat16")
    second = record(tmp_path, "second", device="cuda", precision="bfloat16")
    assert np.array_equal(first.read(0, 0, 96)["logits"], second.read(0, 0, 96)["logits"])
    build = open_toy(
        str(tmp_path / "second"),
        augment=CIFAR,
        device="cuda",
        scales=[1, 2],
        codec={"kind": "dense"},
        teacher=MODEL | {"precision": "bfloat16"},
        seeds="0:3",
    )
    check_teacher(build)
    assert run_build(build).complete_seeds() == [0, 1, 2]


def test_a_plan_says_the_memory_that_the_build_takes(tmp_path):
    build = open_toy(
        str(tmp_path / "cache"),
        augment={"preset": "cifar", "size": 32},
        device="cuda",
        teacher=MODEL | {"input_size": 32},
        # Whole batches, so large that their maps outweigh the weights and what libraries reserve.
        batch_size=96,
        layout={"shard_rows": 96, "chunk_rows": 8},
    )
    planned = make_plan(build).device_bytes
    torch.cuda.reset_peak_memory_stats()
    run_build(build)
    assert 0.5 < torch.cuda.max_memory_allocated() / planned < 1.5
