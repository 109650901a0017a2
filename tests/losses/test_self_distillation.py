"""Second views, same-class pairs, past predictions and virtual teachers against their formulas."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import (
    SelfView,
    cskd_loss,
    ddgsd_loss,
    ddgsd_terms,
    label_loss,
    label_targets,
    pskd_alpha,
    pskd_loss,
    soften_targets,
    virtual_teacher,
    virtual_teacher_loss,
)


@pytest.fixture(scope="session")
def draw_views(draw_logits, draw_labels):
    def draw(seed, num_samples=3):
        logits, features = (
            draw_logits(seed, 2, num_samples, 5),
            draw_logits(seed, 2, num_samples, 4),
        )
        labels_B = draw_labels(seed, num_samples, num_classes=5)
        targets_BC = label_targets(labels_B, num_classes=5, dtype=torch.float64)
        return labels_B, *(SelfView(logits[i], features[i], targets_BC) for i in range(2))

    return draw


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 10))
def test_the_five_terms_are_their_formulas(direct, draw_views, seed, temperature):
    labels_B, a, b = draw_views(seed)
    terms = ddgsd_terms(a, b, temperature=temperature)
    rows = list(zip(a.logits_BC.tolist(), b.logits_BC.tolist(), labels_B.tolist(), strict=True))
    one_hot = [[float(c == y) for c in range(5)] for _, _, y in rows]
    expected = {
        "label_a": direct.mean(
            direct.cross_entropy(t, direct.softmax(za))
            for (za, _, _), t in zip(rows, one_hot, strict=True)
        ),
        "label_b": direct.mean(
            direct.cross_entropy(t, direct.softmax(zb))
            for (_, zb, _), t in zip(rows, one_hot, strict=True)
        ),
        "kl_ab": direct.mean(direct.kd(zb, za, temperature) for za, zb, _ in rows),
        "kl_ba": direct.mean(direct.kd(za, zb, temperature) for za, zb, _ in rows),
        "mmd": sum(
            (direct.mean(a.features_BD[:, d].tolist()) - direct.mean(b.features_BD[:, d].tolist()))
            ** 2
            for d in range(4)
        ),
    }
    for name, value in expected.items():
        assert getattr(terms, name).item() == pytest.approx(value, rel=1e-7, abs=1e-9), name
    total = ddgsd_loss(terms, kl_weight=0.7, mmd_weight=0.01)
    by_hand = (
        expected["label_a"]
        + expected["label_b"]
        + 0.7 * (expected["kl_ab"] + expected["kl_ba"])
        + 0.01 * expected["mmd"]
    )
    assert total.item() == pytest.approx(by_hand, rel=1e-7)


def test_two_equal_views_are_the_label_loss_twice(draw_views):
    labels_B, a, _ = draw_views(1)
    terms = ddgsd_terms(a, a)
    assert (terms.kl_ab, terms.kl_ba, terms.mmd) == (0.0, 0.0, 0.0)
    assert ddgsd_loss(terms).item() == pytest.approx(
        2 * label_loss(a.logits_BC, labels_B).item(), rel=1e-12
    )


def test_gradients_flow_into_both_views(draw_views):
    _, a, b = draw_views(2)

    def loss(logits_a, features_a, logits_b, features_b):
        views = (
            SelfView(logits_a, features_a, a.targets_BC),
            SelfView(logits_b, features_b, b.targets_BC),
        )
        return ddgsd_loss(ddgsd_terms(*views, temperature=2.0), mmd_weight=0.3)

    inputs = (a.logits_BC, a.features_BD, b.logits_BC, b.features_BD)
    assert torch.autograd.gradcheck(loss, tuple(x.clone().requires_grad_() for x in inputs))


def test_detached_targets_are_plain_distillation_each_way(draw_views):
    _, a, b = draw_views(3)
    leaf_a, leaf_b = a.logits_BC.clone().requires_grad_(), b.logits_BC.clone().requires_grad_()
    views = a._replace(logits_BC=leaf_a), b._replace(logits_BC=leaf_b)
    terms = ddgsd_terms(*views, detach_targets=True)
    grad_a, grad_b = torch.autograd.grad(terms.kl_ab, (leaf_a, leaf_b), allow_unused=True)
    assert grad_a is None
    difference = torch.softmax(b.logits_BC, -1) - torch.softmax(a.logits_BC, -1)
    assert torch.allclose(grad_b, difference / 3, atol=1e-12)
    both = ddgsd_terms(*views)
    assert torch.allclose(terms.kl_ab, both.kl_ab)
    assert torch.autograd.grad(both.kl_ab, leaf_a)[0].abs().max() > 1e-3


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20))
def test_cskd_loss_is_its_formula(direct, draw_logits, seed, temperature):
    logits_BC, pair_BC = draw_logits(seed, 2, 3, 5)
    expected = direct.mean(
        direct.kd(z, v, temperature)
        for z, v in zip(logits_BC.tolist(), pair_BC.tolist(), strict=True)
    )
    loss = cskd_loss(logits_BC, pair_BC, temperature=temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-7, abs=1e-9)


def test_a_sample_paired_with_itself_has_nothing_to_learn(draw_logits):
    logits_BC = draw_logits(1, 3, 5).requires_grad_()
    loss = cskd_loss(logits_BC, logits_BC)
    loss.backward()
    assert loss.item() == 0.0
    assert logits_BC.grad.abs().max() < 1e-14


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


def test_samples_without_a_past_prediction_keep_their_label(draw_logits, draw_labels):
    logits_BC, previous_BC = draw_logits(4, 2, 3, 5)
    labels_B = draw_labels(4, 3, num_classes=5)
    targets_BC = label_targets(labels_B, num_classes=5, dtype=torch.float64)
    known_B = torch.tensor([True, False, True])
    softened_BC = soften_targets(targets_BC, previous_BC, alpha=0.4, known_B=known_B)
    assert torch.equal(softened_BC[1], targets_BC[1])
    whole_BC = soften_targets(targets_BC, previous_BC, alpha=0.4)
    assert torch.equal(softened_BC[[0, 2]], whole_BC[[0, 2]])
    unknown_B = torch.zeros(3, dtype=torch.bool)
    loss = pskd_loss(logits_BC, targets_BC, previous_BC, alpha=0.4, known_B=unknown_B)
    assert loss.item() == pytest.approx(label_loss(logits_BC, labels_B).item(), rel=1e-12)
