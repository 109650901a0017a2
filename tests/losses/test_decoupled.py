"""DKD and NKD against their formulas, and where they become other losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import (
    dkd_loss,
    dkd_rows,
    kd_loss,
    kd_rows,
    label_loss,
    nckd_rows,
    nkd_loss,
    tckd_rows,
)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.5, 50),
    alpha=st.floats(0, 4),
    beta=st.floats(0, 10),
)
def test_dkd_loss_is_its_formula(direct, draw_logits, draw_labels, seed, temperature, alpha, beta):
    student_BC, teacher_BC = draw_logits(seed, 2, 3, 5)
    labels_B = draw_labels(seed, 3, num_classes=5)
    expected = direct.mean(
        direct.dkd(z, v, y, temperature, alpha, beta)
        for z, v, y in zip(student_BC.tolist(), teacher_BC.tolist(), labels_B.tolist(), strict=True)
    )
    loss = dkd_loss(
        student_BC, teacher_BC, labels_B, temperature=temperature, alpha=alpha, beta=beta
    )
    assert loss.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_is_tckd_plus_the_teachers_doubt_times_nckd(draw_logits, draw_labels, temperature):
    student_BC, teacher_BC = draw_logits(1, 2, 6, 7)
    labels_B = draw_labels(1, 6, num_classes=7)
    rows = (student_BC, teacher_BC, labels_B)
    p_target_B = torch.softmax(teacher_BC / temperature, -1)[torch.arange(6), labels_B]
    decoupled_B = tckd_rows(*rows, temperature=temperature) + (1 - p_target_B) * nckd_rows(
        *rows, temperature=temperature
    )
    plain_B = kd_rows(student_BC, teacher_BC, temperature=temperature)
    assert torch.allclose(decoupled_B, plain_B, rtol=1e-10, atol=1e-13)


def test_dkd_with_beta_the_teachers_doubt_is_kd(draw_logits, draw_labels):
    student_BC, teacher_BC = draw_logits(2, 2, 1, 7)
    labels_B = draw_labels(2, 1, num_classes=7)
    doubt = 1 - torch.softmax(teacher_BC / 4, -1)[0, labels_B].item()
    rows = dkd_rows(student_BC, teacher_BC, labels_B, temperature=4.0, alpha=1.0, beta=doubt)
    assert torch.allclose(rows, kd_rows(student_BC, teacher_BC, temperature=4.0), rtol=1e-10)


def test_two_classes_leave_nothing_among_the_rest(draw_logits):
    student_BC, teacher_BC = draw_logits(3, 2, 5, 2)
    labels_B = torch.zeros(5, dtype=torch.int64)
    rows = (student_BC, teacher_BC, labels_B)
    assert (nckd_rows(*rows, temperature=4.0) == 0).all()
    assert torch.allclose(
        tckd_rows(*rows, temperature=4.0), kd_rows(student_BC, teacher_BC, temperature=4.0)
    )


def test_the_rest_is_independent_of_the_target_however_far_it_leads(draw_logits):
    student_BC, teacher_BC = draw_logits(4, 2, 3, 6).float()
    labels_B = torch.tensor([0, 0, 0])
    usual_B = nckd_rows(student_BC, teacher_BC, labels_B, temperature=0.1)
    student_BC[:, 0], teacher_BC[:, 0] = 1e4, 1e4  # 1e5 at T = 0.1; subtracting 1000 hides nothing
    far_B = nckd_rows(student_BC, teacher_BC, labels_B, temperature=0.1)
    assert torch.allclose(far_B, usual_B, rtol=1e-5)


def test_a_target_whose_probability_underflows_still_has_a_gradient():
    student_BC = torch.tensor([[-300.0, 0.0, 1.0]], requires_grad=True)
    teacher_BC = torch.tensor([[5.0, 0.0, 1.0]])
    rows = tckd_rows(student_BC, teacher_BC, torch.tensor([0]), temperature=1.0)
    assert torch.softmax(student_BC, -1)[0, 0] == 0.0
    assert rows.item() == pytest.approx(296.0, rel=0.02)
    (gradient_BC,) = torch.autograd.grad(rows.sum(), student_BC)
    assert gradient_BC[0, 0].item() == pytest.approx(-0.9756, rel=1e-3)


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


def test_dkd_reports_both_parts_unweighted_and_detached(draw_logits, draw_labels):
    student_BC, teacher_BC = draw_logits(5, 2, 3, 6)
    rows, report = (student_BC.requires_grad_(), teacher_BC, draw_labels(5, 3, num_classes=6)), {}
    loss = dkd_loss(*rows, temperature=2.0, alpha=0.5, beta=3.0, report=report)
    assert report["tckd"].item() == pytest.approx(tckd_rows(*rows, temperature=2.0).mean().item())
    assert report["nckd"].item() == pytest.approx(nckd_rows(*rows, temperature=2.0).mean().item())
    assert loss.item() == pytest.approx(0.5 * report["tckd"].item() + 3 * report["nckd"].item())
    assert not report["tckd"].requires_grad
