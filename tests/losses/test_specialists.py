from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from distill.losses import (
    active_specialists,
    combine_specialists,
    correct_dustbin,
    dustbin_labels,
    dustbin_logits,
    specialist_loss,
)

SUBSET = torch.tensor([4, 1])


def _fold(p, subset):
    outside = [value for c, value in enumerate(p) if c not in subset]
    return [p[c] for c in subset] + [math.fsum(outside)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.3, 50))
def test_the_dustbin_has_the_probability_of_all_other_classes(
    direct, draw_logits, seed, temperature
):
    logits_BC = draw_logits(seed, 2, 6)
    folded_BS = dustbin_logits(logits_BC, SUBSET, temperature=temperature)
    for b in range(2):
        expected = _fold(direct.softmax(logits_BC[b].tolist(), temperature), SUBSET.tolist())
        found = direct.softmax(folded_BS[b].tolist(), temperature)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_labels_outside_the_subset_become_the_dustbin():
    assert dustbin_labels(torch.tensor([0, 1, 2, 4]), SUBSET).tolist() == [2, 1, 2, 0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20), alpha=st.floats(0, 1))
def test_specialist_loss_is_its_formula(direct, draw_logits, draw_labels, seed, temperature, alpha):
    specialist_BS, generalist_BC = draw_logits(seed, 4, 3), draw_logits(seed + 1, 4, 6)
    labels_B = draw_labels(seed, 4, num_classes=6)
    expected = []
    for b in range(4):
        z = specialist_BS[b].tolist()
        p = _fold(direct.softmax(generalist_BC[b].tolist(), temperature), SUBSET.tolist())
        place = {4: 0, 1: 1}.get(labels_B[b].item(), 2)
        hard = -math.log(direct.softmax(z)[place])
        soft = temperature**2 * direct.kl(p, direct.softmax(z, temperature))
        expected.append((1 - alpha) * hard + alpha * soft)
    loss = specialist_loss(
        specialist_BS, generalist_BC, labels_B, SUBSET, temperature=temperature, alpha=alpha
    )
    assert loss.item() == pytest.approx(direct.mean(expected), rel=1e-7, abs=1e-9)


def test_the_dustbin_regains_the_odds_that_oversampling_took(draw_logits):
    logits_BS = draw_logits(1, 3, 4)
    corrected_BS = correct_dustbin(logits_BS, oversampling=5.0)
    odds = (torch.softmax(x, -1) for x in (corrected_BS, logits_BS))
    after, before = (p[:, -1] / p[:, 0] for p in odds)
    assert torch.allclose(after, 5.0 * before)
    assert torch.equal(logits_BS, draw_logits(1, 3, 4))


def test_a_specialist_is_active_where_it_has_the_likeliest_class():
    p_BC = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    subsets = [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([1])]
    assert active_specialists(p_BC, subsets).tolist() == [
        [True, False, False],
        [False, True, False],
    ]
    assert active_specialists(p_BC, subsets, top=2).tolist() == [
        [True, False, True],
        [True, True, True],
    ]


def _objective(direct, q, generalist, specialists, subsets):
    folded = (direct.kl(p, _fold(q, s)) for p, s in zip(specialists, subsets, strict=True))
    return direct.kl(generalist, q) + math.fsum(folded)


@pytest.mark.parametrize("seed", range(4))
def test_the_combination_is_what_brute_force_finds_on_a_small_simplex(direct, draw_logits, seed):
    subsets = [[0], [1, 2]]
    generalist = torch.softmax(draw_logits(seed, 4, scale=1.0), -1).tolist()
    specialists = [
        torch.softmax(draw_logits(seed + 10 + m, len(s) + 1, scale=1.0), -1).tolist()
        for m, s in enumerate(subsets)
    ]
    parts = 30
    best = min(
        (
            _objective(direct, q, generalist, specialists, subsets),
            q,
        )
        for counts in itertools.product(range(1, parts), repeat=3)
        if sum(counts) < parts
        for q in [[n / parts for n in counts] + [(parts - sum(counts)) / parts]]
    )
    found = combine_specialists(
        torch.tensor([generalist], dtype=torch.float64),
        [torch.tensor([p], dtype=torch.float64) for p in specialists],
        [torch.tensor(s) for s in subsets],
    )
    q = found.q_BC[0].tolist()
    value = _objective(direct, q, generalist, specialists, subsets)
    assert value <= best[0] + 1e-12
    assert value == pytest.approx(best[0], abs=0.02)
    assert q == pytest.approx(best[1], abs=0.05)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 8))
@example(seed=1778, scale=6.0)  # ends at 10,000 steps with a gap of 3e-8
def test_no_nearby_distribution_is_better_than_the_combination_and_its_gap(
    direct, draw_logits, seed, scale
):
    subsets = [[0, 1], [1, 2, 3], [4]]
    generalist = torch.softmax(draw_logits(seed, 6, scale=scale), -1)
    specialists = [
        torch.softmax(draw_logits(seed + 10 + m, len(s) + 1, scale=scale), -1)
        for m, s in enumerate(subsets)
    ]
    found = combine_specialists(
        generalist[None], [p[None] for p in specialists], [torch.tensor(s) for s in subsets]
    )
    gap = found.gap_B.item()
    # Distributions with classes near 0 converge slowly; 1e-4 is the largest gap of 4,000 draws.
    assert gap <= (1e-3 if found.num_steps == 10_000 else 1e-12)
    assert found.q_BC.sum().item() == pytest.approx(1.0, abs=1e-12)
    inputs = (generalist.tolist(), [p.tolist() for p in specialists], subsets)
    best = _objective(direct, found.q_BC[0].tolist(), *inputs)
    for step in range(20):
        nudged = torch.softmax(found.q_BC[0].log() + draw_logits(step, 6, scale=0.02), -1)
        assert _objective(direct, nudged.tolist(), *inputs) >= best - max(gap, 1e-12)


def test_specialists_that_agree_with_the_generalist_change_nothing(direct, draw_logits):
    generalist_BC = torch.softmax(draw_logits(3, 4, 6), -1)
    folded_BS = torch.tensor([_fold(p, SUBSET.tolist()) for p in generalist_BC.tolist()])
    found = combine_specialists(generalist_BC, [folded_BS.double()], [SUBSET])
    assert torch.allclose(found.q_BC, generalist_BC, atol=1e-6)


def test_an_inactive_specialist_changes_nothing_for_that_sample(draw_logits):
    generalist_BC = torch.softmax(draw_logits(4, 2, 6), -1)
    specialist_BS = torch.softmax(draw_logits(5, 2, 3), -1)
    active = torch.tensor([[True], [False]])
    found = combine_specialists(generalist_BC, [specialist_BS], [SUBSET], active_BM=active)
    everyone = combine_specialists(generalist_BC, [specialist_BS], [SUBSET])
    assert torch.allclose(found.q_BC[1], generalist_BC[1], atol=1e-6)
    assert torch.allclose(found.q_BC[0], everyone.q_BC[0], atol=1e-6)
    assert not torch.allclose(found.q_BC[0], generalist_BC[0], atol=1e-3)


def test_without_specialists_the_generalist_is_unchanged(draw_logits):
    generalist_BC = torch.softmax(draw_logits(6, 3, 5), -1)
    found = combine_specialists(generalist_BC, [], [])
    assert torch.allclose(found.q_BC, generalist_BC, atol=1e-12)


def test_certain_specialists_and_classes_of_probability_0_are_combined_too():
    generalist_BC = torch.tensor([[0.0, 0.5, 0.5, 0.0]])
    certain = torch.tensor([[1.0, 0.0]])
    found = combine_specialists(generalist_BC, [certain], [torch.tensor([0])])
    assert found.q_BC[0].tolist() == pytest.approx([0.5, 0.25, 0.25, 0.0], abs=1e-9)


def test_a_combination_stopped_early_bounds_its_error(direct, draw_logits):
    generalist_BC = torch.softmax(draw_logits(7, 1, 6), -1)
    specialist_BS = torch.softmax(draw_logits(8, 1, 3), -1)
    inputs = (generalist_BC, [specialist_BS], [SUBSET])
    early, late = combine_specialists(*inputs, max_steps=2), combine_specialists(*inputs)
    lists = (generalist_BC[0].tolist(), [specialist_BS[0].tolist()], [SUBSET.tolist()])
    excess = _objective(direct, early.q_BC[0].tolist(), *lists) - _objective(
        direct, late.q_BC[0].tolist(), *lists
    )
    assert early.num_steps == 2
    assert early.gap_B.item() > 1e-6
    assert 0 < excess <= early.gap_B.item()
