from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import dist_loss, inter_class_loss, intra_class_loss


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.5, 10),
    beta=st.floats(0, 3),
    gamma=st.floats(0, 3),
)
def test_dist_loss_is_its_formula(direct, draw_logits, seed, temperature, beta, gamma):
    student_BC, teacher_BC = draw_logits(seed, 2, 4, 5)
    p = [direct.softmax(row, temperature) for row in teacher_BC.tolist()]
    q = [direct.softmax(row, temperature) for row in student_BC.tolist()]
    inter = direct.mean(1 - direct.pearson(q[b], p[b]) for b in range(4))
    intra = direct.mean(
        1 - direct.pearson([row[c] for row in q], [row[c] for row in p]) for c in range(5)
    )
    loss = dist_loss(student_BC, teacher_BC, temperature=temperature, beta=beta, gamma=gamma)
    expected = temperature**2 * (beta * inter + gamma * intra)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_equal_logits_have_no_loss(draw_logits):
    logits_BC = draw_logits(1, 8, 6, scale=1.0)
    assert dist_loss(logits_BC, logits_BC, temperature=4.0).item() == pytest.approx(0, abs=1e-4)
    assert dist_loss(logits_BC.float(), logits_BC.float()).item() == pytest.approx(0, abs=1e-4)


def test_opposite_opinions_have_twice_the_loss_of_unrelated_ones():
    student_BC = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert inter_class_loss(student_BC, -student_BC).item() == pytest.approx(2.0)
    assert intra_class_loss(student_BC, -student_BC).item() == pytest.approx(2.0)


def test_one_sample_has_no_correlation_within_classes_and_no_gradient_from_it(draw_logits):
    student_BC = draw_logits(2, 1, 5).requires_grad_()
    loss = intra_class_loss(student_BC, draw_logits(3, 1, 5))
    loss.backward()
    assert loss.item() == 1.0
    assert (student_BC.grad == 0).all()
