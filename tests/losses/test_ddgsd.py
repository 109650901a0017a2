from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import SelfView, ddgsd_loss, ddgsd_terms, label_loss, label_targets


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
