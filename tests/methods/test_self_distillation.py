"""Methods whose teacher is the student itself: what they add up to, and where they end."""

from __future__ import annotations

import json

import pytest
import torch
from support import formulas
from support.recorded_runs import AUGMENT
from support.steps import MemoryHistory, images_of, memory, settings_of, terms_of
from support.streams import MemoryStream, normed_net, plain_net, train_config
from torch import nn
from torch.nn.functional import one_hot

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.models.preprocess import prepare_views
from distill.methods import RunFacts, TeacherFacts, method_of
from distill.methods.self_distillation import logits_and_features
from distill.trainer import train

ALIKE = {"rtol": 2e-5, "atol": 1e-6}
TOYS = {"name": "support.toys:patches", "args": {"num_samples": 96}}


@pytest.fixture
def model():
    torch.manual_seed(3)
    net = plain_net()
    with torch.no_grad():
        net.head.weight.mul_(10)
    return net


def see(stream, views):
    return prepare_views(views.images_BHW3, stream.seen, device="cpu")


def second(batch):
    return batch.other_views["second_view"]


def pair_of(batch):
    return batch.other_views["same_class_pair"]


def direct_features(model, images_B3HW):
    return model.forward_features(images_B3HW).mean(dim=(2, 3)).double()


@pytest.mark.parametrize("num_teachers", [0, 1])
def test_ddgsd_is_its_five_terms_and_a_teachers_two(model, num_teachers):
    stream = memory(num_teachers=num_teachers)
    batch = stream.batch(0)
    settings = settings_of(
        "ddgsd", temperature=2, consistency=0.7, mmd=0.3, teacher_temperature=3, teacher_weight=0.4
    )
    terms, metrics = terms_of(settings, stream, model)
    images = images_of(stream), see(stream, second(batch))
    a, b = (model(each).detach().double() for each in images)
    gap_D = direct_features(model, images[0]).mean(0) - direct_features(model, images[1]).mean(0)
    wanted = {
        "label_a": formulas.label(a, batch),
        "label_b": formulas.label(b, batch),
        "kl_ab": 0.7 * formulas.kd(b, a, 2).mean(),
        "kl_ba": 0.7 * formulas.kd(a, b, 2).mean(),
        "mmd": 0.3 * (gap_D**2).sum(),
    }
    if num_teachers:
        for name, z, views in (("soft_a", a, batch), ("soft_b", b, second(batch))):
            v = views.rows[0]["logits"][:, 0].double()
            wanted[name] = 0.4 * formulas.kd(z, v, 3).mean()
    found = {name: term.detach().double() for name, term in terms.items()}
    torch.testing.assert_close(found, wanted, **ALIKE)
    assert metrics["top1"] == (a.argmax(-1) == batch.labels_B).float().mean()


def test_ddgsd_of_two_equal_views_is_the_label_twice(model):
    stream = memory(num_teachers=0)
    batch = stream.batch(0)
    stream.batch = lambda step: batch._replace(other_views={"second_view": batch})
    terms, _ = terms_of(settings_of("ddgsd", mmd=1), stream, model)
    plain, _ = terms_of(settings_of("ce"), stream, model)
    for name in ("kl_ab", "kl_ba", "mmd"):
        assert terms[name].item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(terms["label_a"], plain["label"])
    torch.testing.assert_close(terms["label_b"], plain["label"])


def test_ddgsd_without_its_weights_is_the_label_of_both_views(model):
    stream = memory(num_teachers=0)
    batch = stream.batch(0)
    terms, _ = terms_of(settings_of("ddgsd", consistency=0, mmd=0), stream, model)
    both = nn.functional.cross_entropy(
        model(torch.cat([images_of(stream), see(stream, second(batch))])),
        batch.labels_B.repeat(2),
    )
    torch.testing.assert_close(sum(terms.values()), 2 * both)


def test_cs_kd_is_its_formula_and_no_gradient_reaches_the_pair(model):
    stream = memory(num_teachers=0)
    batch = stream.batch(0)
    terms, _ = terms_of(settings_of("cs-kd", temperature=3, consistency=0.6), stream, model)
    z, pair = (
        model(each).detach().double() for each in (images_of(stream), see(stream, pair_of(batch)))
    )
    torch.testing.assert_close(terms["label"].double(), formulas.label(z, batch), **ALIKE)
    soft = 0.6 * formulas.kd(z, pair, 3).mean()
    torch.testing.assert_close(terms["soft"].detach().double(), soft, **ALIKE)
    slopes = torch.autograd.grad(terms["soft"], list(model.parameters()))
    constant = see(stream, pair_of(batch))
    teacher = model(constant).detach()
    by_hand = (
        0.6
        * 9
        * nn.functional.kl_div(
            nn.functional.log_softmax(model(images_of(stream)) / 3, -1),
            nn.functional.softmax(teacher / 3, -1),
            reduction="batchmean",
        )
    )
    wanted = torch.autograd.grad(by_hand, list(model.parameters()))
    torch.testing.assert_close(slopes, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight", [0, 1])
def test_cs_kd_with_itself_or_without_weight_is_the_label(model, weight):
    stream = memory(num_teachers=0)
    batch = stream.batch(0)
    if weight:
        stream.batch = lambda step: batch._replace(other_views={"same_class_pair": batch})
    terms, _ = terms_of(settings_of("cs-kd", consistency=weight), stream, model)
    assert terms["soft"].item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(
        terms["label"], terms_of(settings_of("ce"), stream, model)[0]["label"]
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_ps_kd_is_its_formula(model, smoothing):
    stream, history = memory(num_teachers=0), MemoryHistory()
    batch = stream.batch(0)
    past = 3 * torch.randn(8, 5, generator=torch.Generator().manual_seed(9))
    history.write(2, batch.samples_B, past)
    del history.rows[2, 5]
    terms, metrics = terms_of(
        settings_of("ps-kd", final_alpha=0.6),
        stream,
        model,
        epoch=3.25,
        epochs=5,
        smoothing=smoothing,
        history=history,
    )
    z = model(images_of(stream)).detach().double()
    rows = []
    for place in range(8):
        y = (1 - smoothing) * one_hot(batch.labels_B[place], 5).double() + smoothing / 5
        alpha = 0.0 if batch.samples_B[place] == 5 else 0.6 * 4 / 5
        target = (1 - alpha) * y + alpha * formulas.softmax(past[place])
        rows.append(-(target * formulas.softmax(z[place]).log()).sum())
    wanted = torch.stack(rows).mean()
    torch.testing.assert_close(terms["label"].detach().double(), wanted, **ALIKE)
    assert metrics["alpha"].item() == pytest.approx(0.6 * 4 / 5)
    assert metrics["recalled"] == 7 / 8
    kept = torch.stack([history.rows[3, sample] for sample in batch.samples_B.tolist()])
    torch.testing.assert_close(kept.double(), z)
    assert not kept.requires_grad


@pytest.mark.parametrize(("epoch", "final_alpha"), [(0.0, 0.8), (3.0, 0.0)])
def test_ps_kd_of_the_first_epoch_or_without_weight_is_the_label(model, epoch, final_alpha):
    stream, history = memory(num_teachers=0), MemoryHistory()
    history.write(2, stream.batch(0).samples_B, torch.randn(8, 5))
    settings = settings_of("ps-kd", final_alpha=final_alpha)
    terms, _ = terms_of(settings, stream, model, epoch=epoch, epochs=5, history=history)
    torch.testing.assert_close(terms, terms_of(settings_of("ce"), stream, model)[0])


@pytest.mark.parametrize("name", ["ddgsd", "cs-kd", "ps-kd", "specialist"])
def test_mixed_views_are_refused_before_anything_is_read(tmp_path, name):
    config = train_config(
        tmp_path,
        method=settings_of(name).model_dump(),
        dataset=TOYS,
        caches=[],
        augment=AUGMENT["mixed"],
    )
    if name == "specialist":
        teacher = TeacherFacts((1,), 5)
        with pytest.raises(UnsupportedError, match="the recipe mixes samples"):
            method_of(config.method).check(
                config.method, RunFacts((teacher,), plain_net(), 5, 8, mixes=True)
            )
        return
    with pytest.raises(UnsupportedError, match=f"method {name} .*the recipe mixes samples"):
        train(config)
    assert not (tmp_path / "metrics.jsonl").exists()


class Curved(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3 * 8 * 8, 6), nn.Linear(6, 5)

    def forward(self, images_B3HW):
        return self.outer(self.inner(images_B3HW.flatten(1)).tanh()).tanh()


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8)

    def forward(self, images_B3HW):
        return self.conv(images_B3HW).flatten(1)


@pytest.mark.parametrize(
    ("student", "says"),
    [(Curved, "Curved are more than one linear layer"), (Convolved, "has no linear classifier")],
)
def test_ddgsd_refuses_a_student_without_global_features(student, says):
    with pytest.raises(UnsupportedError, match=says):
        method_of(settings_of("ddgsd")).check(settings_of("ddgsd"), RunFacts((), student(), 5, 8))


def test_probing_for_features_leaves_the_student_as_it_was():
    student = normed_net()
    before = json.dumps({k: v.tolist() for k, v in student.state_dict().items()})
    method_of(settings_of("ddgsd")).check(settings_of("ddgsd"), RunFacts((), student.train(), 5, 8))
    assert student.training
    assert json.dumps({k: v.tolist() for k, v in student.state_dict().items()}) == before
    assert not student.head._forward_pre_hooks


def test_features_are_what_the_classifier_reads(model):
    images = images_of(memory())
    logits_BC, features_BD = logits_and_features(model, images)
    torch.testing.assert_close(logits_BC, model(images))
    torch.testing.assert_close(features_BD.double(), direct_features(model, images))
    assert features_BD.requires_grad


def test_ddgsd_takes_no_two_teachers():
    two = (TeacherFacts((1,), 5, origin="a"), TeacherFacts((1,), 5, origin="b"))
    with pytest.raises(ConfigError, match="names 2: a, b"):
        method_of(settings_of("ddgsd")).check(
            settings_of("ddgsd"), RunFacts(two, plain_net(), 5, 8)
        )


@pytest.mark.parametrize("name", ["ddgsd", "cs-kd"])
def test_a_stream_without_pairs_is_refused_in_one_line(tmp_path, name):
    class Bare(MemoryStream):
        def batch(self, step):
            return super().batch(step)._replace(other_views={})

    config = train_config(tmp_path, method={"name": name})
    with pytest.raises(UnsupportedError, match="provides no other views beside each batch's own"):
        train(config, stream=Bare(config))
