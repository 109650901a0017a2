from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import kd_loss, label_loss, nkd_loss


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20), gamma=st.floats(0, 8))
@pytest.mark.parametrize("classes", ["others", "all"])
def test_nkd_loss_is_its_formula(
    direct, draw_logits, draw_labels, classes, seed, temperature, gamma
):
    student_BC, teacher_BC = draw_logits(seed, 2, 3, 5)
    labels_B = draw_labels(seed, 3, num_classes=5)
    expected = direct.mean(
        direct.nkd(z, v, y, temperature, gamma, classes)
        for z, v, y in zip(student_BC.tolist(), teacher_BC.tolist(), labels_B.tolist(), strict=True)
    )
    loss = nkd_loss(
        student_BC, teacher_BC, labels_B, temperature=temperature, gamma=gamma, classes=classes
    )
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_a_teacher_certain_of_the_label_gives_the_label_loss_when_gamma_is_0(
    draw_logits, draw_labels
):
    student_BC, labels_B = draw_logits(1, 4, 6), draw_labels(1, 4, num_classes=6)
    teacher_BC = 1e4 * torch.nn.functional.one_hot(labels_B, 6).double()
    certain = nkd_loss(student_BC, teacher_BC, labels_B, gamma=0.0)
    assert certain.item() == pytest.approx(label_loss(student_BC, labels_B).item(), rel=1e-12)


def test_of_two_classes_only_the_targets_term_is_left(draw_logits):
    student_BC, teacher_BC = draw_logits(2, 2, 4, 2)
    labels_B = torch.tensor([0, 1, 1, 0])
    with_rest = nkd_loss(student_BC, teacher_BC, labels_B, gamma=8.0, temperature=4.0)
    without = nkd_loss(student_BC, teacher_BC, labels_B, gamma=0.0)
    assert with_rest.item() == pytest.approx(without.item(), rel=1e-12)


def test_at_high_temperature_the_rest_match_logits(draw_logits):
    student_BC, teacher_BC = draw_logits(3, 2, 1, 6)
    student_BC.requires_grad_()
    labels_B, temperature, gamma = torch.tensor([2]), 1e5, 1.5
    rest = nkd_loss(student_BC, teacher_BC, labels_B, temperature=temperature, gamma=gamma)
    rest = rest - nkd_loss(student_BC, teacher_BC, labels_B, gamma=0.0)
    (gradient_BC,) = torch.autograd.grad(rest, student_BC)
    others = [0, 1, 3, 4, 5]
    gap = (student_BC - teacher_BC).detach()[0, others]
    limit = gamma * (gap - gap.mean()) / len(others)
    assert torch.allclose(gradient_BC[0, others], limit, atol=1e-4)
    assert gradient_BC[0, 2].abs() < 1e-9


def test_with_all_classes_the_soft_term_has_the_gradient_of_soft_targets(draw_logits):
    student_BC, teacher_BC = draw_logits(4, 2, 3, 6)
    student_BC.requires_grad_()
    labels_B = torch.tensor([0, 1, 2])
    soft = nkd_loss(
        student_BC, teacher_BC, labels_B, temperature=4.0, gamma=8.0, classes="all"
    ) - nkd_loss(student_BC, teacher_BC, labels_B, gamma=0.0)
    plain = 8.0 * kd_loss(student_BC, teacher_BC, temperature=4.0)
    (ours,) = torch.autograd.grad(soft, student_BC)
    (theirs,) = torch.autograd.grad(plain, student_BC)
    assert torch.allclose(ours, theirs, atol=1e-12)


def test_an_unknown_choice_of_classes_is_refused(draw_logits):
    with pytest.raises(KeyError, match="some"):
        nkd_loss(draw_logits(0, 1, 3), draw_logits(1, 1, 3), torch.tensor([0]), classes="some")
