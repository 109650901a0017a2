from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import cskd_loss


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
