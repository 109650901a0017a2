from __future__ import annotations

import pytest
import torch

from distill.losses.logspace import (
    kl_rows,
    log_probabilities,
    pick,
    scale_logits,
    soft_kl_rows,
    widen,
    without_target,
)


@pytest.mark.parametrize(
    ("given", "used"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_values_are_widened_to_float32_and_never_narrowed(given, used):
    assert widen(torch.ones(2, dtype=given)).dtype == used


def test_an_offset_of_1e4_costs_no_decimal_place(draw_logits):
    logits_BC = (draw_logits(0, 4, 7) + 1e4).float()
    wide = torch.log_softmax(logits_BC.double() / 0.1, dim=-1)
    ours = log_probabilities(logits_BC, temperature=0.1).double()
    assert (ours - wide).abs().max() < 1e-5  # 4e-3 for logits divided by T as they are
    assert scale_logits(logits_BC, temperature=0.1).amax() == 0.0


def test_kl_of_equal_rows_is_exactly_zero_and_kl_is_never_negative(draw_logits):
    for seed in range(20):
        p = log_probabilities(draw_logits(seed, 8, 50).float(), temperature=30.0)
        q = log_probabilities(draw_logits(seed + 99, 8, 50).float(), temperature=30.0)
        assert (kl_rows(p, p) == 0).all()
        assert (kl_rows(p, q) > 0).all()


def test_a_class_that_only_q_has_costs_its_mass_and_one_that_q_lacks_is_infinite():
    p = torch.tensor([0.5, 0.5, 0.0]).log()
    q = torch.tensor([0.25, 0.25, 0.5]).log()
    assert kl_rows(p, q).item() == pytest.approx(0.6931471805599453)
    assert kl_rows(q, p).item() == torch.inf


def test_float32_at_high_temperature_agrees_with_float64(draw_logits):
    student, teacher = draw_logits(1, 32, 100).float(), draw_logits(2, 32, 100).float()
    rows = {
        dtype: kl_rows(
            log_probabilities(teacher.to(dtype), temperature=100.0),
            log_probabilities(student.to(dtype), temperature=100.0),
        )
        for dtype in (torch.float32, torch.float64)
    }
    assert torch.allclose(rows[torch.float32].double(), rows[torch.float64], rtol=5e-5, atol=0)


def test_labels_of_a_sample_serve_all_of_its_cells(draw_logits):
    logits_BRC = draw_logits(3, 2, 3, 4)
    labels_B = torch.tensor([1, 3])
    picked_BR = pick(logits_BRC, labels_B.unsqueeze(-1))
    hidden_BRC = without_target(logits_BRC, labels_B.unsqueeze(-1))
    for b, label in enumerate(labels_B.tolist()):
        assert torch.equal(picked_BR[b], logits_BRC[b, :, label])
        assert (hidden_BRC[b, :, label] == -torch.inf).all()
    assert torch.isinf(hidden_BRC).sum() == 2 * 3


def test_soft_kl_of_mixed_types_is_computed_in_the_wider_one(draw_logits):
    student_XC, teacher_XC = draw_logits(0, 4, 9), draw_logits(1, 4, 9)
    for mixed in ((student_XC, teacher_XC.float()), (student_XC.float(), teacher_XC)):
        rows_X = soft_kl_rows(*mixed, temperature=2.0)
        student, teacher = (log_probabilities(x, temperature=2.0) for x in mixed)
        assert rows_X.dtype == torch.float64
        torch.testing.assert_close(rows_X, kl_rows(teacher, student), rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0, 100.0])
def test_soft_kl_is_kl_of_log_probabilities_with_the_same_gradient(
    draw_logits, draw_labels, dtype, temperature
):
    labels_X = draw_labels(7, 6, num_classes=9)
    teacher_XC = without_target(draw_logits(5, 6, 9, scale=20).to(dtype), labels_X)
    weights_X = torch.linspace(0, 2, 6)

    def plain(student_XC):
        both = teacher_XC, student_XC
        return kl_rows(*(log_probabilities(each, temperature=temperature) for each in both))

    def fused(student_XC):
        return soft_kl_rows(student_XC, teacher_XC, temperature=temperature)

    found = []
    for form in (plain, fused):
        logits_XC = draw_logits(6, 6, 9, scale=5).to(dtype).requires_grad_()
        rows_X = form(without_target(logits_XC, labels_X))
        loss = (weights_X.to(rows_X.dtype) * rows_X).sum()
        found.append((rows_X.detach(), *torch.autograd.grad(loss, logits_XC)))
    (plain_X, plain_XC), (fused_X, fused_XC) = found
    assert torch.equal(fused_X, plain_X)
    assert fused_XC.dtype == dtype
    rounding = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(fused_XC, plain_XC, rtol=rounding, atol=rounding / temperature)


def test_soft_kl_keeps_one_tensor_for_its_gradient(draw_logits):
    student_XC = draw_logits(0, 8, 50).requires_grad_()
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        soft_kl_rows(student_XC, draw_logits(1, 8, 50), temperature=4.0)
    assert kept == [student_XC.numel()]


def test_soft_kl_passes_a_nan_on(draw_logits):
    for bad in range(2):
        logits = [draw_logits(0, 2, 5), draw_logits(1, 2, 5)]
        logits[bad][0, 3] = torch.nan
        rows_X = soft_kl_rows(*logits, temperature=2.0)
        assert rows_X.isnan().tolist() == [True, False]
