"""Averaged teachers and teachers matched one by one, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import (
    ensemble_log_probabilities,
    ensemble_logits,
    kd_loss,
    multi_teacher_hard_loss,
    multi_teacher_soft_loss,
)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20), num=st.integers(1, 4))
def test_both_means_are_their_formulas(direct, draw_logits, seed, temperature, num):
    teachers = list(draw_logits(seed, num, 2, 5))
    for mean in ("arithmetic", "geometric"):
        log_p_BC = ensemble_log_probabilities(teachers, temperature=temperature, mean=mean)
        for b in range(2):
            rows = [teacher[b].tolist() for teacher in teachers]
            if mean == "arithmetic":
                each = [direct.softmax(row, temperature) for row in rows]
                expected = [direct.mean(column) for column in zip(*each, strict=True)]
            else:
                logits = [direct.mean(column) for column in zip(*rows, strict=True)]
                expected = direct.softmax(logits, temperature)
            assert log_p_BC[b].exp().tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_equal_teachers_are_one_teacher(draw_logits, mean):
    student_BC, teacher_BC = draw_logits(1, 2, 4, 6)
    several = ensemble_logits([teacher_BC] * 3, temperature=5.0, mean=mean)
    together = kd_loss(student_BC, several, temperature=5.0)
    alone = kd_loss(student_BC, teacher_BC, temperature=5.0)
    assert together.item() == pytest.approx(alone.item(), rel=1e-12)
    heads, teachers = [student_BC], [teacher_BC] * 3
    soft = multi_teacher_soft_loss(heads, teachers, temperature=5.0)
    assert soft.item() == pytest.approx(alone.item(), rel=1e-12)
    hard = multi_teacher_hard_loss(heads, teachers)
    assert hard.item() == pytest.approx(
        multi_teacher_hard_loss(heads, [teacher_BC]).item(), rel=1e-12
    )


def test_the_arithmetic_mean_keeps_a_lone_opinion_that_the_geometric_one_drops():
    sure_of = [torch.tensor([[30.0, 0.0, 0.0]]), torch.tensor([[0.0, 30.0, 29.0]])]
    arithmetic = ensemble_log_probabilities(sure_of, mean="arithmetic").exp()[0]
    geometric = ensemble_log_probabilities(sure_of, mean="geometric").exp()[0]
    assert arithmetic[0].item() == pytest.approx(0.5, abs=1e-3)
    assert geometric[2].item() == pytest.approx(0.23, abs=0.01)
    assert arithmetic[2].item() == pytest.approx(0.134, abs=0.01)


def test_an_ensemble_of_far_teachers_is_finite():
    far = [torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])]
    arithmetic = ensemble_log_probabilities(far, temperature=0.1)
    assert arithmetic.exp()[0].tolist() == pytest.approx([0.5, 0.5])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20), num=st.integers(1, 3))
@pytest.mark.parametrize("shared", [True, False])
def test_several_teachers_are_their_formulas(direct, draw_logits, shared, seed, temperature, num):
    teachers = list(draw_logits(seed, num, 2, 5))
    heads = list(draw_logits(seed + 1, 1 if shared else num, 2, 5))
    soft, hard = [], []
    for i, teacher in enumerate(teachers):
        head = heads[0] if shared else heads[i]
        for b in range(2):
            z, v = head[b].tolist(), teacher[b].tolist()
            soft.append(direct.kd(z, v, temperature))
            hard.append(-math.log(direct.softmax(z, temperature)[v.index(max(v))]))
    assert multi_teacher_soft_loss(
        heads, teachers, temperature=temperature
    ).item() == pytest.approx(direct.mean(soft), rel=1e-7, abs=1e-9)
    assert multi_teacher_hard_loss(
        heads, teachers, temperature=temperature
    ).item() == pytest.approx(direct.mean(hard), rel=1e-9, abs=1e-12)


def test_each_head_learns_from_its_own_teacher_only(draw_logits):
    teachers = list(draw_logits(2, 2, 3, 5))
    heads = [teachers[0].clone().requires_grad_(), draw_logits(3, 3, 5).requires_grad_()]
    multi_teacher_soft_loss(heads, teachers).backward()
    assert heads[0].grad.abs().max() < 1e-12
    assert heads[1].grad.abs().max() > 1e-3


def test_two_heads_for_three_teachers_are_refused(draw_logits):
    heads, teachers = list(draw_logits(4, 2, 3, 5)), list(draw_logits(5, 3, 3, 5))
    for loss in (multi_teacher_soft_loss, multi_teacher_hard_loss):
        with pytest.raises(ValueError, match="zip"):
            loss(heads, teachers)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_the_ensemble_has_the_right_gradient(draw_logits, mean):
    one, two = draw_logits(6, 2, 2, 4).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: ensemble_logits([a, b], temperature=2.0, mean=mean), (one, two)
    )
