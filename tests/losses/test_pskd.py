from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import label_loss, label_targets, pskd_alpha, pskd_loss, soften_targets


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), alpha=st.floats(0, 1))
def test_pskd_loss_is_its_formula(direct, draw_logits, draw_labels, seed, alpha):
    logits_BC, previous_BC = draw_logits(seed, 2, 3, 5)
    labels_B = draw_labels(seed, 3, num_classes=5)
    expected = []
    for b in range(3):
        previous = direct.softmax(previous_BC[b].tolist())
        target = [(1 - alpha) * (c == labels_B[b].item()) + alpha * previous[c] for c in range(5)]
        expected.append(direct.cross_entropy(target, direct.softmax(logits_BC[b].tolist())))
    targets_BC = label_targets(labels_B, num_classes=5, dtype=torch.float64)
    loss = pskd_loss(logits_BC, targets_BC, previous_BC, alpha=alpha)
    assert loss.item() == pytest.approx(direct.mean(expected), rel=1e-9, abs=1e-12)


def test_the_first_epoch_is_the_plain_label_loss(draw_logits, draw_labels):
    logits_BC, previous_BC = draw_logits(1, 2, 3, 5)
    labels_B = draw_labels(1, 3, num_classes=5)
    targets_BC = label_targets(labels_B, num_classes=5)
    loss = pskd_loss(logits_BC, targets_BC, previous_BC, alpha=0.0)
    assert loss.item() == pytest.approx(label_loss(logits_BC, labels_B).item(), rel=1e-12)


def test_softened_mixed_labels_still_sum_to_one(draw_logits):
    targets_BC = label_targets(
        torch.tensor([0, 1]), torch.tensor([2, 1]), torch.tensor([0.3, 1.0]), num_classes=3
    )
    softened_BC = soften_targets(targets_BC, draw_logits(2, 2, 3), alpha=0.4)
    assert torch.allclose(softened_BC.sum(-1), torch.ones(2, dtype=torch.float64))


def test_the_softened_labels_are_constants(draw_logits):
    previous_BC = draw_logits(3, 2, 3).requires_grad_()
    targets_BC = label_targets(torch.tensor([0, 1]), num_classes=3)
    assert not soften_targets(targets_BC, previous_BC, alpha=0.4).requires_grad


@pytest.mark.parametrize(
    ("epoch", "alpha"),
    [(0.0, 0.08), (0.99, 0.08), (1.0, 0.16), (4.5, 0.4), (9.999, 0.8), (10.0, 0.8), (12.0, 0.8)],
)
def test_alpha_rises_once_an_epoch_to_its_final_value(epoch, alpha):
    assert pskd_alpha(epoch, epochs=10) == pytest.approx(alpha)
