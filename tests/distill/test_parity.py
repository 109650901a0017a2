"""Training from a cache is training with the teacher beside it: the same losses at every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.builds import open_toy, run_build
from torch import Tensor

from cache_service.format.cells import expand_cells
from distill.config import TrainConfig
from distill.methods import TeacherFacts
from distill.stream import LiveTeacher
from distill.trainer import train

MIXED = {
    "size": 16,
    "ops": [{"op": "pad_crop"}, {"op": "horizontal_flip"}, {"op": "mixup"}, {"op": "cutmix"}],
}
PLAIN = {"preset": "cifar", "size": 16}

BOUNDS = {
    # Largest difference of a step's loss, nats, at T = 4 and logits spread over about 10 nats.
    "dense": ({"kind": "dense"}, 1e-3),
    "features": ({"kind": "features"}, 1e-3),
    "int8": ({"kind": "int8"}, 2e-2),
    "topk": ({"kind": "topk", "k": 4}, 5e-2),
}


def _losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.parametrize("augment", [PLAIN, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("method", ["kd", "sd-kd"])
@pytest.mark.parametrize("codec", BOUNDS)
def test_cached_and_live_teacher_give_the_same_loss_at_every_step(tmp_path, codec, method, augment):
    settings, bound = BOUNDS[codec]
    build = open_toy(str(tmp_path / "c"), codec=settings, augment=augment, scales=[1, 2])
    cache = run_build(build)
    config = TrainConfig.model_validate(
        {
            "dataset": build.config.dataset,
            "caches": str(tmp_path / "c"),
            "student": {"model": "support.toys:tiny_net", "model_args": {"width": 6}},
            "method": {"name": method},
            # Two runs drift apart by their rounding, the faster the larger the steps; at 0.02 this
            # network of 6 channels and batches of 12 turn 1e-4 into 1e-2 within an epoch.
            "optimizer": {"name": "sgd", "lr": 0.005},
            "epochs": 1,
            "batch_size": 12,
            "workers": 0,
            "device": "cpu",
            "log_every": 1,
            "out": str(tmp_path / "cached"),
        }
    )
    train(config)
    live = open_toy(str(tmp_path / "unused"), augment=augment, scales=[1, 2]).teacher

    def answer(views_BHW3: Tensor) -> Tensor:
        stored = live.answer(views_BHW3)
        return torch.from_numpy(expand_cells(stored, (1, 2), live.stored_scales))

    teacher = cache.spec.teacher
    facts = TeacherFacts(cache.spec.scales, teacher.num_classes, preprocess=teacher.preprocess)
    beside = config.model_copy(update={"out": str(tmp_path / "live")})
    train(beside, teachers=[LiveTeacher(facts, answer)])
    cached, alive = _losses(tmp_path / "cached"), _losses(tmp_path / "live")
    assert len(cached) == len(alive) == 8
    assert max(abs(a - b) for a, b in zip(cached, alive, strict=True)) < bound
    assert cached[0] != cached[-1]
