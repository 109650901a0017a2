"""Where one method becomes another."""

from __future__ import annotations

import pytest
import torch
from support import formulas
from support.steps import images_of, memory, settings_of, terms_of
from support.streams import plain_net
from torch import nn

from cache_service.models.features import cell_logits
from cache_service.models.preprocess import prepare_views
from distill.losses import sdd_dkd_loss, sdd_kd_loss, sdd_nkd_loss

ALIKE = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(params=[False, True], ids=["plain", "mixed"])
def stream(request):
    return memory(mixed=request.param)


@pytest.fixture
def model():
    torch.manual_seed(3)
    return plain_net()


def equal_teachers(number, *, mixed=False):
    stream = memory(mixed=mixed, num_teachers=number)
    stream.teacher_logits = lambda batch, *, temperature, cache: batch.rows[0]["logits"]
    return stream


def slopes(terms, model):
    weights = list(model.parameters())
    return torch.autograd.grad(sum(terms.values()), weights, retain_graph=True)


def assert_same(found, wanted, model):
    """Term by term, and in what they do to the weights."""
    torch.testing.assert_close(found, wanted, **ALIKE)
    torch.testing.assert_close(slopes(found, model), slopes(wanted, model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("cells", "plain"), [("sd-kd", "kd"), ("sd-dkd", "dkd"), ("sd-nkd", "nkd")]
)
def test_on_the_whole_image_alone_a_cells_method_is_the_plain_one(stream, model, cells, plain):
    same = {"classes": "all", "gamma": 3} if plain == "nkd" else {}
    assert_same(
        terms_of(settings_of(cells, scales=[1], temperature=4, **same), stream, model)[0],
        terms_of(settings_of(plain, temperature=4, **same), stream, model)[0],
        model,
    )


@pytest.mark.parametrize(("cells", "plain"), [("sd-kd", "kd"), ("sd-dkd", "dkd")])
def test_so_it_is_where_logits_are_standardized(stream, model, cells, plain):
    found, _ = terms_of(settings_of(cells, scales=[1], standardize=True), stream, model)
    assert_same(found, terms_of(settings_of(plain, standardize=True), stream, model)[0], model)


@pytest.mark.parametrize("name", ["sd-kd", "sd-dkd", "sd-nkd"])
def test_weights_of_1_are_the_plain_mean_over_cells(stream, model, name):
    whole = {"warmup_epochs": 0} if name != "sd-kd" else {}
    found, _ = terms_of(settings_of(name, complementary_weight=1, **whole), stream, model)
    every = [
        terms_of(settings_of(name, complementary_weight=w, **whole), stream, model)[0]["soft"]
        for w in (0, 2)
    ]
    # The loss is linear in the weight, so that 1 lies in the middle of none and twice.
    torch.testing.assert_close(found["soft"], sum(every) / 2, **ALIKE)
    batch, cells_BRC = stream.batch(0), cell_logits(model, images_of(stream), (1, 2)).double()
    teacher_BRC = batch.rows[0]["logits"].double()
    labels_BR = formulas.larger_part(batch)[:, None].expand(-1, 5)
    rows_BR = {
        "sd-kd": lambda: 0.9 * formulas.kd(cells_BRC, teacher_BRC, 4),
        "sd-dkd": lambda: (
            formulas.tckd(cells_BRC, teacher_BRC, labels_BR, 4)
            + 8 * formulas.nckd(cells_BRC, teacher_BRC, labels_BR, 4)
        ),
        "sd-nkd": lambda: formulas.nkd(cells_BRC, teacher_BRC, labels_BR, 4, 8, "all"),
    }[name]()
    torch.testing.assert_close(found["soft"].double(), rows_BR.mean(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "loss", "options"),
    [("sd-dkd", sdd_dkd_loss, {}), ("sd-nkd", sdd_nkd_loss, {"classes": "all"})],
)
def test_a_cells_method_is_the_loss_that_others_can_import(
    stream, model, name, loss, options, weight
):
    settings = settings_of(name, complementary_weight=weight, warmup_epochs=0)
    terms, metrics = terms_of(settings, stream, model)
    batch = stream.batch(0)
    wanted = loss(
        cell_logits(model, images_of(stream), (1, 2)),
        batch.rows[0]["logits"],
        formulas.larger_part(batch),
        complementary_weight=weight,
        **options,
    )
    torch.testing.assert_close(terms["soft"], wanted, **ALIKE)
    assert 0 < metrics["complementary"] < 1


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.0])
def test_sd_kd_is_the_loss_that_others_can_import(stream, model, weight):
    settings = settings_of("sd-kd", alpha=1, complementary_weight=weight)
    terms, metrics = terms_of(settings, stream, model)
    batch = stream.batch(0)
    cells_BRC = cell_logits(model, images_of(stream), (1, 2))
    wanted = sdd_kd_loss(
        cells_BRC,
        batch.rows[0]["logits"],
        formulas.larger_part(batch),
        complementary_weight=weight,
    )
    torch.testing.assert_close(terms["soft"], wanted, **ALIKE)
    assert 0 < metrics["complementary"] < 1


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("soft", {}),
        ("soft", {"direction": "reverse"}),
        ("soft", {"standardize": True}),
        ("hard", {}),
        ("ensemble", {}),
        ("ensemble", {"mean": "geometric"}),
        ("ensemble", {"standardize": True}),
    ],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_several_equal_teachers_are_one(model, name, written, mixed):
    settings = settings_of(name, **written)
    several, _ = terms_of(settings, equal_teachers(3, mixed=mixed), model)
    alone, _ = terms_of(settings, equal_teachers(1, mixed=mixed), model)
    assert_same(several, alone, model)


@pytest.mark.parametrize("name", ["soft", "ensemble"])
def test_one_teacher_is_kd(stream, model, name):
    settings = {"temperature": 5, "alpha": 0.7}
    found, _ = terms_of(settings_of(name, **settings), stream, model)
    assert_same(found, terms_of(settings_of("kd", **settings), stream, model)[0], model)


def test_a_shared_head_is_pulled_to_the_arithmetic_mean(model):
    stream = memory(num_teachers=3)
    settings = {"temperature": 2, "alpha": 0.7}
    soft, _ = terms_of(settings_of("soft", **settings), stream, model)
    mean, _ = terms_of(settings_of("ensemble", **settings), stream, model)
    torch.testing.assert_close(slopes(soft, model), slopes(mean, model), **ALIKE)
    assert soft["soft"] > mean["soft"] + 0.1  # by how much the teachers disagree


def test_at_high_temperature_kd_matches_logits(stream, model):
    hot, _ = terms_of(settings_of("kd", temperature=1000), stream, model)
    limit, _ = terms_of(settings_of("logits"), stream, model)
    torch.testing.assert_close(hot, limit, rtol=5e-3, atol=1e-5)
    found, wanted = (
        torch.cat([slope.flatten() for slope in slopes(terms, model)]) for terms in (hot, limit)
    )
    assert (found - wanted).norm() < 5e-3 * wanted.norm()


def centered(logits_BC):
    return logits_BC - logits_BC.mean(-1, keepdim=True)


def test_at_high_temperature_an_ensemble_matches_the_mean_of_its_logits(model):
    stream = memory(num_teachers=3)
    terms, _ = terms_of(settings_of("ensemble", temperature=1000, alpha=1), stream, model)
    mean_BC = torch.stack([rows["logits"][:, 0] for rows in stream.batch(0).rows]).mean(0)
    gap_BC = centered(model(images_of(stream))) - centered(mean_BC)
    torch.testing.assert_close(terms["soft"], 0.5 * gap_BC.pow(2).mean(), rtol=5e-3, atol=1e-5)


def test_at_high_temperature_dkd_matches_the_logits_of_the_other_classes(model):
    stream = memory()
    batch = stream.batch(0)
    _, metrics = terms_of(settings_of("dkd", temperature=1000), stream, model)
    both = (model(images_of(stream)).detach(), batch.rows[0]["logits"][:, 0])
    z_BC, v_BC = (centered(formulas.others(each, batch.labels_B)) for each in both)
    wanted = 0.5 * (z_BC - v_BC).pow(2).mean()
    torch.testing.assert_close(metrics["nckd"].double(), wanted, rtol=1e-2, atol=1e-5)


def test_at_high_temperature_ddgsd_matches_the_logits_of_both_views(model):
    stream = memory(num_teachers=0)
    second = stream.batch(0).other_views["second_view"]
    second = prepare_views(second.images_BHW3, stream.seen, device="cpu")
    with torch.no_grad():
        model.head.weight.mul_(30)  # apart enough for float32 at this T
    terms, _ = terms_of(settings_of("ddgsd", temperature=200, consistency=1), stream, model)
    gap_BC = centered(model(images_of(stream))) - centered(model(second))
    for name in ("kl_ab", "kl_ba"):
        torch.testing.assert_close(terms[name], 0.5 * gap_BC.pow(2).mean(), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("name", ["kd", "dkd", "sd-kd", "sd-dkd", "soft", "ensemble"])
def test_a_standardized_student_is_free_in_scale_and_offset(stream, model, name):
    class Stretched(nn.Module):
        def forward_features(self, images_B3HW):
            return model.forward_features(images_B3HW)

        def forward_head(self, map_BDHW):
            return 7 * model.forward_head(map_BDHW) + 100

        def forward(self, images_B3HW):
            return self.forward_head(self.forward_features(images_B3HW))

    def soft(settings, student):
        return terms_of(settings, stream, student)[0]["soft"]

    free, bound = settings_of(name, standardize=True), settings_of(name)
    torch.testing.assert_close(soft(free, Stretched()), soft(free, model), rtol=1e-3, atol=1e-5)
    assert abs(soft(bound, Stretched()) - soft(bound, model)) > 0.01


def test_dkd_of_weights_1_and_the_teachers_doubt_is_kd_of_a_single_view(model):
    # KD = TCKD + (1 - p_target) NCKD; with one view the factor is one number.
    stream = memory()
    batch = stream.batch(0)
    stream.batch = lambda step: type(batch)(
        *(tensor[:1] for tensor in batch[:5]),
        rows=({"logits": batch.rows[0]["logits"][:1]},),
        cursor=batch.cursor,
    )
    one = stream.batch(0)
    p_target = formulas.own(formulas.softmax(one.rows[0]["logits"][:, 0], 4), one.labels_B)
    settings = settings_of("dkd", beta=1 - p_target.item(), warmup_epochs=0)
    found = terms_of(settings, stream, model)[0]["soft"]
    wanted = terms_of(settings_of("kd", alpha=1), stream, model)[0]["soft"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_nkd_of_all_classes_pulls_as_kd_does(stream, model):
    def soft_slopes(settings):
        terms, _ = terms_of(settings, stream, model)
        return torch.autograd.grad(terms["soft"], list(model.parameters()))

    def nkd(gamma):
        return settings_of("nkd", temperature=4, gamma=gamma, classes="all", warmup_epochs=0)

    with_soft, without = soft_slopes(nkd(8)), soft_slopes(nkd(0))
    kd = soft_slopes(settings_of("kd", alpha=1))
    for whole, target, wanted in zip(with_soft, without, kd, strict=True):
        torch.testing.assert_close(whole - target, 8 * wanted, rtol=1e-3, atol=1e-3)


def test_tf_kd_of_a_copy_is_kd(stream, model):
    found, _ = terms_of(settings_of("tf-kd", form="self"), stream, model)
    wanted, _ = terms_of(settings_of("kd", temperature=6, alpha=0.905), stream, model)
    torch.testing.assert_close(found, wanted)


def test_dist_is_blind_to_what_correlation_is_blind_to(model):
    """A teacher that is half as sure correlates wholly with a student that kd would pull."""
    stream = memory()
    p_BC = model(images_of(stream)).detach().softmax(-1)
    doubt_BC = (0.5 * p_BC + 0.5 / p_BC.shape[-1]).log()
    stream.teacher_logits = lambda *_, **__: doubt_BC.unsqueeze(1)
    terms, _ = terms_of(settings_of("dist"), stream, model)
    pulled, _ = terms_of(settings_of("kd", temperature=1), stream, model)
    assert terms["inter"].abs() < 1e-4
    assert terms["intra"].abs() < 1e-4
    assert pulled["soft"] > 1e-3


@pytest.mark.parametrize("name", ["dkd", "nkd", "sd-dkd", "sd-nkd"])
@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"),
    [
        (0.0, 20, 1 / 20),
        (0.99, 20, 1 / 20),
        (1.0, 20, 2 / 20),
        (19.0, 20, 1.0),
        (300.0, 20, 1.0),
        (0.0, 1, 1.0),
        (0.0, 0, 1.0),
        (3.5, 0, 1.0),
    ],
)
def test_the_teacher_comes_in_by_whole_epochs(model, name, epoch, epochs, factor):
    stream = memory()
    whole, _ = terms_of(settings_of(name, warmup_epochs=0), stream, model)
    found, _ = terms_of(settings_of(name, warmup_epochs=epochs), stream, model, epoch=epoch)
    torch.testing.assert_close(found["soft"], factor * whole["soft"])
    torch.testing.assert_close(found["label"], whole["label"])
