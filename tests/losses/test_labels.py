from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import label_loss, label_targets, majority_labels, soft_cross_entropy


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    smoothing=st.floats(0, 1),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
)
def test_label_loss_is_its_formula(direct, draw_logits, draw_labels, seed, smoothing, shares):
    logits_BC = draw_logits(seed, 3, 5)
    labels_B, partners_B = draw_labels(seed, 2, 3, num_classes=5)
    weights_B = torch.tensor(shares, dtype=torch.float64)
    expected = []
    for b, share in enumerate(shares):
        target = [smoothing / 5] * 5
        target[labels_B[b]] += (1 - smoothing) * share
        target[partners_B[b]] += (1 - smoothing) * (1 - share)
        expected.append(direct.cross_entropy(target, direct.softmax(logits_BC[b].tolist())))
    loss = label_loss(logits_BC, labels_B, partners_B, weights_B, smoothing=smoothing)
    assert loss.item() == pytest.approx(direct.mean(expected), rel=1e-9, abs=1e-12)


def test_label_loss_is_torch_cross_entropy_with_torch_smoothing(draw_logits, draw_labels):
    logits_BC, labels_B = draw_logits(0, 6, 9), draw_labels(0, 6, num_classes=9)
    for smoothing in (0.0, 0.1):
        theirs = torch.nn.functional.cross_entropy(logits_BC, labels_B, label_smoothing=smoothing)
        ours = label_loss(logits_BC, labels_B, smoothing=smoothing)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_label_loss_is_the_cross_entropy_of_its_targets_with_the_same_gradient(
    draw_logits, draw_labels
):
    labels_B, partners_B = draw_labels(3, 2, 6, num_classes=9)
    weights_B = torch.linspace(0, 1, 6, dtype=torch.float64)
    both = []
    for form in (
        lambda s: label_loss(s, labels_B, partners_B, weights_B, smoothing=0.2),
        lambda s: soft_cross_entropy(
            s,
            label_targets(
                labels_B, partners_B, weights_B, num_classes=9, smoothing=0.2, dtype=s.dtype
            ),
        ),
    ):
        logits_BC = draw_logits(3, 6, 9).requires_grad_()
        loss = form(logits_BC)
        both.append((loss.detach(), *torch.autograd.grad(loss, logits_BC)))
    torch.testing.assert_close(*both, rtol=1e-12, atol=1e-15)


def test_an_unmixed_sample_in_a_mixed_batch_has_its_plain_label(draw_logits, draw_labels):
    logits_BC, labels_B = draw_logits(1, 4, 5), draw_labels(1, 4, num_classes=5)
    mixed = label_loss(logits_BC, labels_B, labels_B, torch.ones(4))
    assert mixed.item() == pytest.approx(label_loss(logits_BC, labels_B).item(), rel=1e-12)


def test_targets_sum_to_one(draw_labels):
    labels_B, partners_B = draw_labels(2, 2, 7, num_classes=4)
    targets_BC = label_targets(
        labels_B, partners_B, torch.linspace(0, 1, 7), num_classes=4, smoothing=0.3
    )
    assert torch.allclose(targets_BC.sum(-1), torch.ones(7))
    assert targets_BC.min() >= 0.3 / 4 - 1e-7


def test_partners_without_weights_are_a_programming_error():
    with pytest.raises(AssertionError, match="together"):
        label_targets(torch.tensor([0]), torch.tensor([1]), num_classes=2)
    with pytest.raises(AssertionError, match="together"):
        label_loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([1]))


def test_the_majority_label_is_the_own_one_from_a_half_upwards():
    own, partner = torch.tensor([1, 1, 1]), torch.tensor([2, 2, 2])
    weights = torch.tensor([0.49, 0.5, 1.0])
    assert majority_labels(own, partner, weights).tolist() == [2, 1, 1]
