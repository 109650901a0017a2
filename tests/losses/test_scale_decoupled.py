"""Losses of cells against their formulas, the published masks, and the plain forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import (
    dkd_loss,
    dkd_rows,
    kd_loss,
    kd_rows,
    nckd_rows,
    nkd_loss,
    nkd_rows,
    sdd_dkd_loss,
    sdd_kd_loss,
    sdd_nkd_loss,
    sdd_weights,
    standardize_logits,
    tckd_rows,
)


def _published_weights(teacher_BRC, labels_B):
    """Four masks, as the paper names them: global/local, true/wrong."""
    weights = []
    for sample, label in zip(teacher_BRC.tolist(), labels_B.tolist(), strict=True):
        verdicts = [max(range(len(row)), key=row.__getitem__) for row in sample]
        row = []
        for verdict in verdicts:
            global_true, local_true = verdicts[0] == label, verdict == label
            if (global_true and local_true) or (not global_true and not local_true):
                row.append(1.0)
            else:
                row.append(2.0)
        weights.append(row)
    return weights


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), temperature=st.floats(0.5, 20), gamma=st.floats(0, 8))
def test_the_three_forms_are_their_formulas(
    direct, draw_logits, draw_labels, seed, temperature, gamma
):
    student_BRC, teacher_BRC = draw_logits(seed, 2, 3, 5, 4)
    labels_B = draw_labels(seed, 3, num_classes=4)
    weights = _published_weights(teacher_BRC, labels_B)
    forms = {
        "kd": lambda z, v, _y: direct.kd(z, v, temperature),
        "dkd": lambda z, v, y: direct.dkd(z, v, y, temperature, 1.0, gamma),
        "nkd": lambda z, v, y: direct.nkd(z, v, y, temperature, gamma, "others"),
        "nkd all": lambda z, v, y: direct.nkd(z, v, y, temperature, gamma, "all"),
    }
    expected = {
        name: sum(
            weights[b][r]
            * form(student_BRC[b, r].tolist(), teacher_BRC[b, r].tolist(), labels_B[b].item())
            for b in range(3)
            for r in range(5)
        )
        / (5 * 3)
        for name, form in forms.items()
    }
    inputs = (student_BRC, teacher_BRC, labels_B)
    found = {
        "kd": sdd_kd_loss(*inputs, temperature=temperature),
        "dkd": sdd_dkd_loss(*inputs, temperature=temperature, beta=gamma),
        "nkd": sdd_nkd_loss(*inputs, temperature=temperature, gamma=gamma),
        "nkd all": sdd_nkd_loss(*inputs, temperature=temperature, gamma=gamma, classes="all"),
    }
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-7, abs=1e-9), name


def test_weights_are_those_of_the_four_published_masks(draw_logits, draw_labels):
    for seed in range(50):
        teacher_BRC = draw_logits(seed, 6, 21, 3)
        labels_B = draw_labels(seed, 6, num_classes=3)
        weights_BR = sdd_weights(teacher_BRC, labels_B)
        assert weights_BR.tolist() == _published_weights(teacher_BRC, labels_B)
        assert set(weights_BR.unique().tolist()) == {1.0, 2.0}
        assert (weights_BR[:, 0] == 1.0).all()


def test_a_complementary_cell_has_the_given_weight():
    right, wrong = [1.0, 0.0], [0.0, 1.0]
    teacher_BRC = torch.tensor([[right, wrong, right], [wrong, wrong, right]])
    weights_BR = sdd_weights(teacher_BRC, torch.tensor([0, 0]), complementary_weight=3.5)
    assert weights_BR.tolist() == [[1.0, 3.5, 1.0], [1.0, 1.0, 3.5]]


def test_one_cell_is_the_plain_form(draw_logits, draw_labels):
    student_BRC, teacher_BRC = draw_logits(1, 2, 6, 1, 5)
    labels_B = draw_labels(1, 6, num_classes=5)
    cells, plain = (student_BRC, teacher_BRC), (student_BRC[:, 0], teacher_BRC[:, 0])
    assert torch.equal(sdd_kd_loss(*cells, labels_B), kd_loss(*plain))
    # Both average over the batch, before or after their two parts are added.
    torch.testing.assert_close(sdd_dkd_loss(*cells, labels_B), dkd_loss(*plain, labels_B))
    assert torch.equal(
        sdd_nkd_loss(*cells, labels_B, temperature=1.0, gamma=1.5), nkd_loss(*plain, labels_B)
    )


def test_complementary_weight_1_is_the_mean_of_plain_losses_of_the_cells(draw_logits, draw_labels):
    student_BRC, teacher_BRC = draw_logits(2, 2, 6, 5, 4)
    labels_B = draw_labels(2, 6, num_classes=4)
    inputs, one = (student_BRC, teacher_BRC, labels_B), {"complementary_weight": 1.0}
    settings_of = {
        sdd_kd_loss: lambda s, t: kd_rows(s, t, temperature=4.0),
        sdd_dkd_loss: lambda s, t: dkd_rows(s, t, labels_B, temperature=4.0, alpha=1.0, beta=8.0),
        sdd_nkd_loss: lambda s, t: nkd_rows(s, t, labels_B, temperature=4.0, gamma=8.0),
    }
    for loss, rows in settings_of.items():
        cells = [rows(student_BRC[:, r], teacher_BRC[:, r]).mean().item() for r in range(5)]
        assert loss(*inputs, **one).item() == pytest.approx(sum(cells) / 5, rel=1e-12)
        assert loss(*inputs).item() > loss(*inputs, **one).item()


def test_standardized_cells_keep_the_weights_of_raw_logits(draw_logits, draw_labels):
    student_BRC, teacher_BRC = draw_logits(3, 2, 6, 5, 4)
    labels_B = draw_labels(3, 6, num_classes=4)
    z, v = standardize_logits(student_BRC), standardize_logits(teacher_BRC)
    weights_BR = sdd_weights(teacher_BRC, labels_B)
    plain = {
        sdd_kd_loss: kd_rows(z, v, temperature=4.0),
        sdd_dkd_loss: dkd_rows(z, v, labels_B[:, None], temperature=4.0, alpha=1.0, beta=8.0),
    }
    for loss, rows_BR in plain.items():
        found = loss(student_BRC, teacher_BRC, labels_B, standardize=True)
        assert found.item() == pytest.approx((weights_BR * rows_BR).mean().item(), rel=1e-12)


def test_a_report_has_the_fraction_of_complementary_cells_and_both_parts(draw_logits, draw_labels):
    student_BRC, teacher_BRC = draw_logits(4, 2, 6, 5, 3)
    labels_B, report = draw_labels(4, 6, num_classes=3), {}
    inputs = (student_BRC.requires_grad_(), teacher_BRC, labels_B)
    sdd_dkd_loss(*inputs, complementary_weight=3.0, report=report)
    weights_BR = sdd_weights(teacher_BRC, labels_B, complementary_weight=3.0)
    fraction = (weights_BR == 3.0).double().mean().item()
    rows = (student_BRC, teacher_BRC, labels_B[:, None])
    wanted = {
        "complementary": fraction,
        "weight_consistent": 1 - fraction,
        "weight_complementary": 3 * fraction,
        "tckd": tckd_rows(*rows, temperature=4.0).mean().item(),
        "nckd": nckd_rows(*rows, temperature=4.0).mean().item(),
    }
    assert 0 < fraction < 1
    assert {name: value.item() for name, value in report.items()} == pytest.approx(wanted)
    assert not any(value.requires_grad for value in report.values())


def test_a_teacher_at_temperature_1_of_its_own_only_changes_the_targets_term(
    draw_logits, draw_labels
):
    student_BRC, teacher_BRC, at_1_BRC = draw_logits(5, 3, 6, 5, 4)
    labels_B = draw_labels(5, 6, num_classes=4)
    inputs = (student_BRC, teacher_BRC, labels_B)
    found = sdd_nkd_loss(*inputs, gamma=0.0, teacher_at_1_BRC=at_1_BRC)
    weights_BR = sdd_weights(teacher_BRC, labels_B)
    rows_BR = nkd_rows(student_BRC, at_1_BRC, labels_B[:, None], temperature=4.0, gamma=0.0)
    assert found.item() == pytest.approx((weights_BR * rows_BR).mean().item(), rel=1e-12)
