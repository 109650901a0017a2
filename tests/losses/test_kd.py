"""Soft targets, logit matching and standardized logits against their formulas and limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_service.errors import ConfigError
from distill.losses import kd_loss, logit_matching_loss, soft_cross_entropy, standardize_logits


def _gradient(loss, logits):
    (gradient,) = torch.autograd.grad(loss, logits)
    return gradient


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 50), scale=st.floats(0, 20))
def test_kd_loss_is_its_formula_in_both_directions(direct, draw_logits, seed, temperature, scale):
    student_BC, teacher_BC = draw_logits(seed, 2, 3, 5, scale=scale)
    for direction in ("forward", "reverse"):
        pairs = [(student_BC, teacher_BC), (teacher_BC, student_BC)][direction == "reverse"]
        expected = direct.mean(
            direct.kd(one.tolist(), other.tolist(), temperature)
            for one, other in zip(*pairs, strict=True)
        )
        loss = kd_loss(student_BC, teacher_BC, temperature=temperature, direction=direction)
        assert loss.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_an_unknown_direction_is_refused(draw_logits):
    with pytest.raises(ConfigError, match="direction is forward or reverse, got 'sideways'"):
        kd_loss(draw_logits(0, 1, 3), draw_logits(1, 1, 3), direction="sideways")


def test_the_reverse_direction_has_a_gradient_of_its_own(draw_logits):
    student_BC, teacher_BC = draw_logits(3, 2, 4, 6)
    student_BC.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda s: kd_loss(s, teacher_BC, temperature=2.0, direction="reverse"), (student_BC,)
    )


def test_the_gradient_of_kd_is_t_times_the_difference_of_probabilities(draw_logits):
    student_BC, teacher_BC = draw_logits(4, 2, 4, 6)
    student_BC.requires_grad_()
    gradient_BC = _gradient(kd_loss(student_BC, teacher_BC, temperature=3.0), student_BC)
    p_BC, q_BC = (torch.softmax(x.detach() / 3.0, -1) for x in (teacher_BC, student_BC))
    assert torch.allclose(gradient_BC, 3.0 * (q_BC - p_BC) / 4, atol=1e-14)


@pytest.mark.parametrize(("temperature", "error"), [(1e3, 1e-2), (1e5, 1e-4)])
def test_high_temperature_is_logit_matching(draw_logits, temperature, error):
    student_BC, teacher_BC = draw_logits(5, 2, 4, 6)
    student_BC.requires_grad_()
    warm = kd_loss(student_BC, teacher_BC, temperature=temperature)
    cold = 0.5 * logit_matching_loss(student_BC, teacher_BC)
    assert warm.item() == pytest.approx(cold.item(), rel=error)

    # Without T**2 the gradient of one sample tends to (z - v) / (C T**2), logits zero-mean.
    zero_mean_BC = (student_BC - teacher_BC).detach()
    zero_mean_BC = zero_mean_BC - zero_mean_BC.mean(-1, keepdim=True)
    bare_BC = _gradient(4 * warm / temperature**2, student_BC)
    limit_BC = zero_mean_BC / (6 * temperature**2)
    assert torch.allclose(bare_BC, limit_BC, rtol=0, atol=error * limit_BC.abs().max().item())


def test_logit_matching_is_its_formula(direct, draw_logits):
    student_BC, teacher_BC = draw_logits(6, 2, 3, 5)
    squares = [
        ((z[c] - direct.mean(z)) - (v[c] - direct.mean(v))) ** 2
        for z, v in zip(student_BC.tolist(), teacher_BC.tolist(), strict=True)
        for c in range(5)
    ]
    loss = logit_matching_loss(student_BC, teacher_BC)
    assert loss.item() == pytest.approx(direct.mean(squares), rel=1e-12)


def test_soft_cross_entropy_is_kl_plus_the_entropy_of_the_targets(direct, draw_logits):
    student_BC, teacher_BC = draw_logits(7, 2, 3, 5)
    targets_BC = torch.softmax(teacher_BC, -1)
    entropy = direct.mean(direct.cross_entropy(p, p) for p in targets_BC.tolist())
    difference = soft_cross_entropy(student_BC, targets_BC) - kd_loss(
        student_BC, teacher_BC, temperature=1.0
    )
    assert difference.item() == pytest.approx(entropy, rel=1e-9)


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
