"""What each method's terms add up to: its formula, in float64, on random answers."""

from __future__ import annotations

import pytest
import torch
from support import formulas
from support.steps import images_of, memory, settings_of, terms_of
from support.streams import plain_net
from torch.nn.functional import one_hot

from cache_service.models.features import cell_logits


@pytest.fixture(params=[False, True], ids=["plain", "mixed"])
def stream(request):
    return memory(mixed=request.param, num_teachers=3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    net = plain_net()
    with torch.no_grad():
        net.head.weight.mul_(10)
    return net


@pytest.fixture
def seen(stream, model):
    """batch, student cells [B, R, C], teachers' cells [B, R, C], larger part of each view."""
    batch = stream.batch(0)
    cells_BRC = cell_logits(model, images_of(stream), (1, 2)).detach().double()
    teachers = [rows["logits"].double() for rows in batch.rows]
    return batch, cells_BRC, teachers, formulas.larger_part(batch)


def assert_terms(found, **wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name].detach().double(), value.double(), rtol=2e-5, atol=1e-6
        )


def weights(teacher_BRC, labels_B, complementary_weight):
    """Cell by cell, as the paper has it."""
    predictions_BR = teacher_BRC.argmax(-1).tolist()
    found = []
    for predictions, label in zip(predictions_BR, labels_B.tolist(), strict=True):
        image_is_right = predictions[0] == label
        found.append(
            [
                1.0 if (prediction == label) == image_is_right else complementary_weight
                for prediction in predictions
            ]
        )
    return torch.tensor(found, dtype=torch.float64)


def assert_weights(metrics, weights_BR, *, complementary_weight):
    """What each kind of cell weighs: the weights of its cells, divided by all cells."""
    every = weights_BR.flatten().tolist()
    kinds = {
        "weight_consistent": [weight for weight in every if weight == 1],
        "weight_complementary": [weight for weight in every if weight == complementary_weight],
    }
    for name, chosen in kinds.items():
        assert 0 < len(chosen) < len(every)
        assert metrics[name].item() == pytest.approx(sum(chosen) / len(every)), name


@pytest.mark.parametrize("standardize", [False, True])
def test_kd(stream, model, seen, standardize):
    batch, cells_BRC, teachers, _ = seen
    settings = settings_of("kd", temperature=3, alpha=0.7, standardize=standardize)
    z, v = cells_BRC[:, 0], teachers[0][:, 0]
    if standardize:
        z, v = formulas.z_score(z), formulas.z_score(v)
    assert_terms(
        terms_of(settings, stream, model)[0],
        label=0.3 * formulas.label(cells_BRC[:, 0], batch),
        soft=0.7 * formulas.kd(z, v, 3).mean(),
    )


@pytest.mark.parametrize("standardize", [False, True])
def test_dkd(stream, model, seen, standardize):
    batch, cells_BRC, teachers, labels_B = seen
    z, v = cells_BRC[:, 0], teachers[0][:, 0]
    if standardize:
        z, v = formulas.z_score(z), formulas.z_score(v)
    settings = settings_of("dkd", temperature=2, alpha=0.5, beta=3, standardize=standardize)
    terms, metrics = terms_of(settings, stream, model, epoch=4.5)
    tckd = formulas.tckd(z, v, labels_B, 2).mean()
    nckd = formulas.nckd(z, v, labels_B, 2).mean()
    assert_terms(
        terms,
        label=formulas.label(cells_BRC[:, 0], batch),
        soft=5 / 20 * (0.5 * tckd + 3 * nckd),
    )
    assert_terms({name: metrics[name] for name in ("tckd", "nckd")}, tckd=tckd, nckd=nckd)


@pytest.mark.parametrize("standardize", [False, True])
def test_sd_kd(stream, model, seen, standardize):
    batch, cells_BRC, teachers, labels_B = seen
    settings = settings_of(
        "sd-kd", temperature=2, alpha=0.7, complementary_weight=4, standardize=standardize
    )
    z, v = cells_BRC, teachers[0]
    if standardize:
        z, v = formulas.z_score(z), formulas.z_score(v)
    rows_BR = weights(teachers[0], labels_B, 4) * formulas.kd(z, v, 2)
    terms, metrics = terms_of(settings, stream, model)
    assert_terms(
        terms, label=0.3 * formulas.label(cells_BRC[:, 0], batch), soft=0.7 * rows_BR.mean()
    )
    assert_weights(metrics, weights(teachers[0], labels_B, 4), complementary_weight=4)


@pytest.mark.parametrize("standardize", [False, True])
def test_sd_dkd(stream, model, seen, standardize):
    batch, cells_BRC, teachers, labels_B = seen
    settings = settings_of(
        "sd-dkd",
        temperature=2,
        alpha=0.5,
        beta=3,
        complementary_weight=4,
        warmup_epochs=10,
        standardize=standardize,
    )
    terms, metrics = terms_of(settings, stream, model, epoch=2.0)
    z, v = cells_BRC, teachers[0]
    if standardize:
        z, v = formulas.z_score(z), formulas.z_score(v)
    rows = (z, v, labels_B[:, None].expand(-1, 5))
    tckd_BR, nckd_BR = formulas.tckd(*rows, 2), formulas.nckd(*rows, 2)
    weights_BR = weights(teachers[0], labels_B, 4)
    assert_terms(
        terms,
        label=formulas.label(cells_BRC[:, 0], batch),
        soft=3 / 10 * (weights_BR * (0.5 * tckd_BR + 3 * nckd_BR)).sum() / weights_BR.numel(),
    )
    assert_weights(metrics, weights_BR, complementary_weight=4)
    share = (weights_BR == 4).double().mean()
    assert 0 < share < 1
    assert_terms(
        {name: metrics[name] for name in ("tckd", "nckd", "complementary")},
        tckd=tckd_BR.mean(),
        nckd=nckd_BR.mean(),
        complementary=share,
    )


@pytest.mark.parametrize("classes", ["others", "all"])
def test_nkd(stream, model, seen, classes):
    batch, cells_BRC, teachers, labels_B = seen
    settings = settings_of("nkd", temperature=2, gamma=0.7, classes=classes)
    rows_B = formulas.nkd(cells_BRC[:, 0], teachers[0][:, 0], labels_B, 2, 0.7, classes)
    assert_terms(
        terms_of(settings, stream, model, epoch=9)[0],
        label=formulas.label(cells_BRC[:, 0], batch),
        soft=10 / 20 * rows_B.mean(),
    )


@pytest.mark.parametrize("classes", ["others", "all"])
def test_sd_nkd(stream, model, seen, classes):
    batch, cells_BRC, teachers, labels_B = seen
    settings = settings_of(
        "sd-nkd", temperature=2, gamma=0.7, classes=classes, complementary_weight=3
    )
    terms, metrics = terms_of(settings, stream, model, epoch=50)
    rows = (cells_BRC, teachers[0], labels_B[:, None].expand(-1, 5))
    weights_BR = weights(teachers[0], labels_B, 3)
    assert_terms(
        terms,
        label=formulas.label(cells_BRC[:, 0], batch),
        soft=(weights_BR * formulas.nkd(*rows, 2, 0.7, classes)).mean(),
    )
    assert metrics["complementary"] == (weights_BR == 3).float().mean()
    assert_weights(metrics, weights_BR, complementary_weight=3)


def test_logits(stream, model, seen):
    batch, cells_BRC, teachers, _ = seen
    z, v = cells_BRC[:, 0], teachers[0][:, 0]
    gap = (z - z.mean(-1, keepdim=True)) - (v - v.mean(-1, keepdim=True))
    assert_terms(
        terms_of(settings_of("logits", alpha=0.6), stream, model)[0],
        label=0.4 * formulas.label(z, batch),
        soft=0.6 * 0.5 * gap.square().mean(),
    )


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_soft(stream, model, seen, direction, standardize):
    batch, cells_BRC, teachers, _ = seen
    z, members = cells_BRC[:, 0], [v[:, 0] for v in teachers]
    if standardize:
        z, members = formulas.z_score(z), [formulas.z_score(v) for v in members]
    each = [formulas.kd(*((z, v) if direction == "forward" else (v, z)), 2).mean() for v in members]
    settings = settings_of(
        "soft", temperature=2, alpha=0.6, direction=direction, standardize=standardize
    )
    assert_terms(
        terms_of(settings, stream, model)[0],
        label=0.4 * formulas.label(cells_BRC[:, 0], batch),
        soft=0.6 * sum(each) / 3,
    )


def test_hard(stream, model, seen):
    batch, cells_BRC, teachers, _ = seen
    z = cells_BRC[:, 0]
    each = [
        -formulas.own(formulas.softmax(z, 2).log(), v[:, 0].argmax(-1)).mean() for v in teachers
    ]
    assert_terms(
        terms_of(settings_of("hard", temperature=2, alpha=0.6), stream, model)[0],
        label=0.4 * formulas.label(z, batch),
        hard=0.6 * sum(each) / 3,
    )


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_ensemble(stream, model, seen, mean, standardize):
    batch, cells_BRC, teachers, _ = seen
    z, members = cells_BRC[:, 0], torch.stack([v[:, 0] for v in teachers])
    if standardize:
        z, members = formulas.z_score(z), formulas.z_score(members)
    p_BC = {
        "arithmetic": lambda: formulas.softmax(members, 2).mean(0),
        "geometric": lambda: formulas.softmax(members.mean(0), 2),
    }[mean]()
    settings = settings_of("ensemble", temperature=2, alpha=0.6, mean=mean, standardize=standardize)
    assert_terms(
        terms_of(settings, stream, model)[0],
        label=0.4 * formulas.label(cells_BRC[:, 0], batch),
        soft=0.6 * 4 * formulas.kl(p_BC, formulas.softmax(z, 2)).mean(),
    )


def test_dist(stream, model, seen):
    batch, cells_BRC, teachers, _ = seen
    z, v = cells_BRC[:, 0], teachers[0][:, 0]
    q, p = formulas.softmax(z, 2), formulas.softmax(v, 2)
    assert_terms(
        terms_of(settings_of("dist", temperature=2, beta=3, gamma=5), stream, model)[0],
        label=formulas.label(z, batch),
        inter=3 * 4 * (1 - formulas.pearson(p, q)).mean(),
        intra=5 * 4 * (1 - formulas.pearson(p.T, q.T)).mean(),
    )


def test_tf_kd_of_a_virtual_teacher(stream, model, seen):
    batch, cells_BRC, _, labels_B = seen
    z = cells_BRC[:, 0]
    label_BC = one_hot(labels_B, z.shape[-1]).double()
    u = 0.95 * label_BC + 0.05 / (z.shape[-1] - 1) * (1 - label_BC)
    settings = settings_of("tf-kd", temperature=2, alpha=0.3, correct=0.95)
    stream.teacher_logits = None  # would fail if it were called
    assert_terms(
        terms_of(settings, stream, model)[0],
        label=0.7 * formulas.label(z, batch),
        soft=0.3 * formulas.kl(formulas.softmax(u, 2), formulas.softmax(z)).mean(),
    )
