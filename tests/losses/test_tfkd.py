from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import label_loss, virtual_teacher, virtual_teacher_loss


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.1, 50), correct=st.floats(0.9, 0.999))
def test_virtual_teacher_loss_is_its_formula(
    direct, draw_logits, draw_labels, seed, temperature, correct
):
    logits_BC, labels_B = draw_logits(seed, 3, 5), draw_labels(seed, 3, num_classes=5)
    expected = []
    for b in range(3):
        u = [correct if c == labels_B[b] else (1 - correct) / 4 for c in range(5)]
        p = direct.softmax(u, temperature)
        expected.append(direct.kl(p, direct.softmax(logits_BC[b].tolist())))
    loss = virtual_teacher_loss(logits_BC, labels_B, correct=correct, temperature=temperature)
    assert loss.item() == pytest.approx(direct.mean(expected), rel=1e-9, abs=1e-11)


def test_the_virtual_teacher_is_a_distribution_that_is_nearly_always_right():
    u_BC = virtual_teacher(torch.tensor([2, 0]), num_classes=4, correct=0.94)
    assert torch.allclose(u_BC, torch.tensor([[0.02, 0.02, 0.94, 0.02], [0.94, 0.02, 0.02, 0.02]]))


def test_a_cold_virtual_teacher_is_the_label(draw_logits, draw_labels):
    logits_BC, labels_B = draw_logits(1, 4, 6), draw_labels(1, 4, num_classes=6)
    cold = virtual_teacher_loss(logits_BC, labels_B, temperature=1e-3)
    assert cold.item() == pytest.approx(label_loss(logits_BC, labels_B).item(), rel=1e-9)
