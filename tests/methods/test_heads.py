"""Heads for teachers: how many a student may have, held against its teachers before a run."""

from __future__ import annotations

import re

import pytest
from support.steps import settings_of
from support.streams import MemoryStream, normed_net, plain_net, train_config
from support.toys import NUM_CLASSES
from torch import nn

from cache_service.errors import ConfigError
from distill.methods import RunFacts, TeacherFacts, method_of
from distill.methods.multi_teacher import HeadLogits
from distill.trainer import train

TEACHER = TeacherFacts((1, 2), NUM_CLASSES, origin="caches/a")


class Headed(nn.Module):
    def __init__(self, num_teacher_heads):
        super().__init__()
        self.num_teacher_heads = num_teacher_heads
        self.net = plain_net()

    def forward(self, images_B3HW):
        return self.net(images_B3HW)

    def forward_heads(self, images_B3HW):
        answer = self(images_B3HW)
        return HeadLogits(answer, (answer,) * self.num_teacher_heads)


def outcome(settings, student, num_teachers):
    try:
        plan = RunFacts((TEACHER,) * num_teachers, student, NUM_CLASSES, 16)
        method_of(settings).check(settings, plan)
    except ConfigError as refusal:
        return str(refusal)
    return "fine"


@pytest.mark.parametrize("name", ["soft", "hard"])
@pytest.mark.parametrize(
    ("heads", "found", "num_teachers", "says"),
    [
        ("any", None, 3, "fine"),
        ("any", 1, 3, "fine"),
        ("any", 3, 3, "fine"),
        ("any", 2, 3, "learns from 3 teachers by 1 or 3 heads of the student, which has 2"),
        ("any", 2, 1, "learns from 1 teacher by 1 head of the student, which has 2"),
        ("shared", None, 2, "fine"),
        ("shared", 1, 2, "fine"),
        ("shared", 2, 2, "by 1 head of the student, which has 2.*num_tokens=1"),
        ("each", 2, 2, "fine"),
        ("each", 1, 1, "fine"),
        ("each", 1, 2, "by 2 heads of the student, which has 1.*num_tokens=2"),
        ("each", None, 2, "TinyNet has no heads for teachers.*vit_tokens.*num_tokens: 2"),
    ],
)
def test_heads_are_one_for_all_or_one_for_each(name, heads, found, num_teachers, says):
    student = normed_net() if found is None else Headed(found)
    assert re.search(says, outcome(settings_of(name, heads=heads), student, num_teachers))


def test_tokens_that_do_not_suit_are_refused_before_anything_is_read(tmp_path):
    arguments = {"backbone": "vit_tiny_patch16_224", "num_tokens": 3, "depth": 1}
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "num_heads": 1}
    config = train_config(
        tmp_path,
        method={"name": "soft"},
        student={"model": "distill.tokens:vit_tokens", "model_args": arguments | sizes},
    )
    stream = MemoryStream(config, num_teachers=2)
    stream.batches = None  # would fail if it were called
    with pytest.raises(ConfigError, match=r"2 teachers by 1 or 2 heads.*has 3") as refusal:
        train(config, stream=stream)
    assert refusal.value.exit_code == 2
    assert not (tmp_path / "metrics.jsonl").exists()
