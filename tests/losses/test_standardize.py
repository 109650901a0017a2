from __future__ import annotations

import math

import pytest
import torch

from distill.losses import kd_loss, standardize_logits


def test_a_row_is_its_z_score(direct, draw_logits):
    logits_BC = draw_logits(1, 3, 6)
    for row, scores in zip(logits_BC.tolist(), standardize_logits(logits_BC).tolist(), strict=True):
        mean = direct.mean(row)
        deviation = math.sqrt(sum((z - mean) ** 2 for z in row) / (len(row) - 1))
        assert scores == pytest.approx([(z - mean) / (deviation + 1e-7) for z in row], rel=1e-12)


def test_a_student_off_by_scale_and_offset_matches_its_teacher(draw_logits):
    teacher_BC = draw_logits(2, 3, 6)
    student_BC = 0.2 * teacher_BC + 7.0
    pair = standardize_logits(student_BC), standardize_logits(teacher_BC)
    assert kd_loss(*pair, temperature=2.0).item() == pytest.approx(0.0, abs=1e-12)
    assert kd_loss(student_BC, teacher_BC, temperature=2.0).item() > 0.1


def test_equal_logits_become_zeros_with_a_finite_gradient():
    logits_BC = torch.full((2, 5), 3.0, requires_grad=True)
    scores_BC = standardize_logits(logits_BC)
    kd_loss(scores_BC, torch.randn(2, 5)).backward()
    assert (scores_BC == 0).all()
    assert torch.isfinite(logits_BC.grad).all()


def test_it_has_the_right_gradient(draw_logits):
    logits_BC = draw_logits(3, 3, 6).requires_grad_()
    assert torch.autograd.gradcheck(standardize_logits, (logits_BC,))
