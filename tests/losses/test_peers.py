from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import (
    ensemble_logits,
    kd_loss,
    label_loss,
    peer_losses,
    peer_match_loss,
)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 10), num=st.integers(2, 4))
def test_peer_losses_are_their_formula(direct, draw_logits, draw_labels, seed, temperature, num):
    students = list(draw_logits(seed, num, 3, 5))
    labels_B = draw_labels(seed, 3, num_classes=5)
    losses = peer_losses(students, labels_B, temperature=temperature, peer_weight=0.6)
    assert len(losses) == num
    for k, loss in enumerate(losses):
        expected = []
        for b in range(3):
            own = students[k][b].tolist()
            target = [float(c == labels_B[b]) for c in range(5)]
            match = direct.mean(
                direct.kd(own, students[m][b].tolist(), temperature) for m in range(num) if m != k
            )
            expected.append(direct.cross_entropy(target, direct.softmax(own)) + 0.6 * match)
        assert loss.item() == pytest.approx(direct.mean(expected), rel=1e-7, abs=1e-9)


def test_a_single_peer_has_the_plain_label_loss(draw_logits, draw_labels):
    logits_BC = draw_logits(1, 4, 5).requires_grad_()
    labels_B, partners_B = draw_labels(1, 2, 4, num_classes=5)
    mixed = (labels_B, partners_B, torch.tensor([0.2, 1.0, 0.5, 0.8]))
    (alone,) = peer_losses([logits_BC], *mixed, smoothing=0.1)
    plain = label_loss(logits_BC, *mixed, smoothing=0.1)
    assert torch.equal(alone, plain)
    ours, theirs = (torch.autograd.grad(x, logits_BC)[0] for x in (alone, plain))
    assert torch.equal(ours, theirs)


def test_equal_peers_have_the_label_loss_alone(draw_logits, draw_labels):
    logits_BC, labels_B = draw_logits(2, 4, 5), draw_labels(2, 4, num_classes=5)
    for loss in peer_losses([logits_BC] * 3, labels_B):
        assert loss.item() == pytest.approx(label_loss(logits_BC, labels_B).item(), rel=1e-12)


def test_the_gradient_of_a_loss_reaches_its_own_student_only(draw_logits, draw_labels):
    students = [draw_logits(seed, 4, 5).requires_grad_() for seed in range(3)]
    losses = peer_losses(students, draw_labels(3, 4, num_classes=5))
    for k, loss in enumerate(losses):
        gradients = torch.autograd.grad(loss, students, allow_unused=True, retain_graph=True)
        assert [gradient is not None for gradient in gradients] == [k == m for m in range(3)]


def test_matching_each_other_has_the_gradient_of_matching_their_mean(draw_logits):
    own_BC = draw_logits(4, 4, 5).requires_grad_()
    others = list(draw_logits(5, 3, 4, 5))
    mean_BC = ensemble_logits(others, temperature=2.0, mean="arithmetic")
    each = torch.autograd.grad(peer_match_loss(own_BC, others, temperature=2.0), own_BC)[0]
    mean = torch.autograd.grad(kd_loss(own_BC, mean_BC, temperature=2.0), own_BC)[0]
    assert torch.allclose(each, mean, atol=1e-14)
