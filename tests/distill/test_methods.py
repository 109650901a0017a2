"""Methods: their registry, their loss terms, and what they refuse before a run."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from support.steps import REQUIRED, images_of, settings_of, terms_of
from support.streams import MemoryStream, normed_net, plain_net, train_config
from support.toys import NUM_CLASSES

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.models.features import cell_logits
from distill.methods import METHODS, MethodConfig, RunFacts, TeacherFacts, method_of
from distill.methods.kd import KD
from distill.methods.scale_decoupled import SDKD, select_cells


@pytest.fixture
def stream():
    return MemoryStream(train_config("unused", batch_size=8))


@pytest.fixture
def model():
    torch.manual_seed(3)
    return plain_net()


def test_every_method_is_found_by_the_name_it_carries():
    assert {"ce", "kd", "sd-kd"} <= METHODS.keys()
    for name, method in METHODS.items():
        written = {"name": name, **REQUIRED.get(name, {})}
        settings = TypeAdapter(MethodConfig).validate_python(written)
        assert isinstance(settings, method.settings)
        assert method_of(settings) is method


@pytest.mark.parametrize("name", METHODS)
def test_terms_are_float32_scalars_that_reach_the_student(name, stream, model):
    terms, metrics = terms_of(settings_of(name), stream, model)
    assert all(term.shape == () and term.dtype == torch.float32 for term in terms.values())
    assert all(not value.requires_grad for value in metrics.values())
    sum(terms.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_ce_is_cross_entropy(stream, model):
    batch = stream.batch(0)
    terms, metrics = terms_of(METHODS["ce"].settings(), stream, model)
    logits_BC = model(images_of(stream))
    torch.testing.assert_close(terms["label"], F.cross_entropy(logits_BC, batch.labels_B))
    right = (logits_BC.argmax(1) == batch.labels_B).float().mean()
    assert metrics["top1"] == right


def test_mixed_labels_count_by_their_shares(model):
    stream = MemoryStream(train_config("unused", batch_size=8), mixed=True)
    batch = stream.batch(0)
    terms, metrics = terms_of(METHODS["ce"].settings(), stream, model)
    logits_BC = model(images_of(stream))
    own = F.cross_entropy(logits_BC, batch.labels_B, reduction="none")
    other = F.cross_entropy(logits_BC, batch.partner_labels_B, reduction="none")
    wanted = (batch.weights_B * own + (1 - batch.weights_B) * other).mean()
    torch.testing.assert_close(terms["label"], wanted)
    larger = torch.where(batch.weights_B >= 0.5, batch.labels_B, batch.partner_labels_B)
    assert metrics["top1"] == (logits_BC.argmax(1) == larger).float().mean()


def test_label_smoothing_reaches_the_label_loss(stream, model):
    terms, _ = terms_of(METHODS["ce"].settings(), stream, model, smoothing=0.2)
    wanted = F.cross_entropy(
        model(images_of(stream)), stream.batch(0).labels_B, label_smoothing=0.2
    )
    torch.testing.assert_close(terms["label"], wanted)


def kl_rows(teacher, student, temperature):
    p = F.softmax(teacher.double() / temperature, -1)
    log_q = F.log_softmax(student.double() / temperature, -1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1)


def test_kd_is_its_formula(stream, model):
    terms, _ = terms_of(KD(temperature=3, alpha=0.7), stream, model)
    logits_BC, batch = model(images_of(stream)), stream.batch(0)
    soft = kl_rows(batch.rows[0]["logits"][:, 0], logits_BC, 3).mean()
    torch.testing.assert_close(terms["soft"].double(), 0.7 * soft, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(terms["label"], 0.3 * F.cross_entropy(logits_BC, batch.labels_B))


def test_sd_kd_is_its_formula_and_reports_complementary_cells(stream, model):
    settings = SDKD(temperature=2, alpha=0.6, complementary_weight=3)
    terms, metrics = terms_of(settings, stream, model)
    batch = stream.batch(0)
    cells_BRC = cell_logits(model, images_of(stream), (1, 2))
    teacher_BRC = batch.rows[0]["logits"]
    right_BR = teacher_BRC.argmax(-1) == batch.labels_B[:, None]
    complementary_BR = right_BR != right_BR[:, :1]
    weights_BR = torch.where(complementary_BR, 3.0, 1.0)
    soft = (weights_BR * kl_rows(teacher_BRC, cells_BRC, 2)).mean()
    torch.testing.assert_close(terms["soft"].double(), 0.6 * soft, rtol=1e-5, atol=1e-6)
    label = F.cross_entropy(model(images_of(stream)), batch.labels_B)
    torch.testing.assert_close(terms["label"], 0.4 * label)
    assert 0 < complementary_BR.float().mean() < 1
    assert metrics["complementary"] == complementary_BR.float().mean()


def test_a_mixed_view_is_judged_by_its_larger_part(model):
    stream = MemoryStream(train_config("unused", batch_size=8), mixed=True)
    _, metrics = terms_of(SDKD(), stream, model)
    batch = stream.batch(0)
    larger_B = torch.where(batch.weights_B >= 0.5, batch.labels_B, batch.partner_labels_B)

    def share(labels_B):
        right_BR = batch.rows[0]["logits"].argmax(-1) == labels_B[:, None]
        return (right_BR != right_BR[:, :1]).float().mean()

    assert share(larger_B) != share(batch.labels_B)
    assert metrics["complementary"] == share(larger_B)


def test_the_share_of_complementary_cells_does_not_depend_on_their_weight(stream, model):
    shares = {
        terms_of(SDKD(complementary_weight=weight), stream, model)[1]["complementary"].item()
        for weight in (0.0, 0.5, 1.0, 2.0)
    }
    assert len(shares) == 1


def test_sd_kd_on_the_whole_image_alone_is_kd(stream, model):
    sdd, _ = terms_of(SDKD(scales=(1,)), stream, model)
    plain, _ = terms_of(KD(), stream, model)
    torch.testing.assert_close(sdd, plain)


@pytest.mark.parametrize("wanted", [(1,), (1, 2), (1, 4), (1, 2, 4)])
def test_a_subset_of_scales_takes_exactly_their_cells(wanted):
    recorded = (1, 2, 4)
    names = [f"{side}:{cell}" for side in recorded for cell in range(side * side)]
    cells_BRC = torch.arange(len(names)).reshape(1, -1, 1)
    taken = [names[index] for index in select_cells(cells_BRC, recorded, wanted)[0, :, 0]]
    assert taken == [f"{side}:{cell}" for side in wanted for cell in range(side * side)]
    assert len(taken) == list(accumulate(side * side for side in wanted))[-1]


def test_sd_kd_on_fewer_scales_equals_a_recording_of_fewer_scales(model):
    wide = MemoryStream(train_config("unused", batch_size=8), scales=(1, 2, 4))
    narrow = MemoryStream(train_config("unused", batch_size=8), scales=(1, 4))
    keep = [0, *range(5, 21)]
    narrow.teacher_logits = lambda batch, **_: wide.batch(0).rows[0]["logits"][:, keep]
    found, _ = terms_of(SDKD(scales=(1, 4)), wide, model)
    wanted, _ = terms_of(SDKD(), narrow, model)
    torch.testing.assert_close(found, wanted)


def test_labels_are_for_the_ordinary_logits_where_pooling_is_chained(model):
    # A 3 x 3 map under a 2 x 2 grid: the chained whole image counts the middle four times.
    stream = MemoryStream(train_config("unused", batch_size=8), pooling="chained")
    images = images_of(stream)[:, :, :6, :6]
    stream.seen = stream.seen.model_copy(update={"size": 6})
    batch = stream.batch(0)
    stream.batch = lambda step: batch._replace(images_BHW3=batch.images_BHW3[:, :6, :6])
    terms, _ = terms_of(SDKD(alpha=0.5), stream, model)
    plain = F.cross_entropy(model(images), batch.labels_B)
    torch.testing.assert_close(terms["label"], 0.5 * plain)
    cells_BRC = cell_logits(model, images, (1, 2), pooling="chained")
    assert not torch.allclose(cells_BRC[:, 0], model(images), atol=1e-4)
    uniform, _ = terms_of(SDKD(alpha=0.5, complementary_weight=1), stream, model)
    soft = kl_rows(batch.rows[0]["logits"], cells_BRC, 4).mean()
    torch.testing.assert_close(uniform["soft"].double(), 0.5 * soft, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 2, 4)])
def test_chained_cells_come_from_the_finest_recorded_grid_whichever_are_used(model, scales):
    # A 3 x 3 map: by way of 4 x 4 its cells are others than by way of 2 x 2, or none.
    stream = MemoryStream(train_config("unused", batch_size=8), pooling="chained", scales=(1, 2, 4))
    stream.seen = stream.seen.model_copy(update={"size": 6})
    batch = stream.batch(0)
    stream.batch = lambda step: batch._replace(images_BHW3=batch.images_BHW3[:, :6, :6])
    images = images_of(stream)
    used = sum(side * side for side in scales)
    cells_BRC = cell_logits(model, images, (1, 2, 4), pooling="chained")[:, :used]
    terms, _ = terms_of(SDKD(alpha=1, scales=scales, complementary_weight=1), stream, model)
    wanted = kl_rows(batch.rows[0]["logits"][:, :used], cells_BRC, 4).mean()
    torch.testing.assert_close(terms["soft"].double(), wanted, rtol=1e-5, atol=1e-6)
    shorter_BRC = cell_logits(model, images, scales, pooling="chained")
    assert (len(scales) == 3) == torch.allclose(shorter_BRC, cells_BRC, atol=1e-4)


TEACHER = TeacherFacts((1, 2), NUM_CLASSES, origin="caches/a")


def check(settings, *, teachers=(TEACHER,), student=None):
    plan = RunFacts(tuple(teachers), student or normed_net(), NUM_CLASSES, 16)
    method_of(settings).check(settings, plan)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_accepts_one_teacher_of_the_same_classes(name):
    check(settings_of(name))


def test_labels_alone_need_no_teacher():
    check(METHODS["ce"].settings(), teachers=())


@pytest.mark.parametrize("name", ["kd", "sd-kd"])
@pytest.mark.parametrize(
    ("teachers", "says"),
    [
        ((), "learns from a teacher, but `caches` is empty"),
        ((TEACHER, TEACHER), "learns from one teacher, but `caches` names 2: caches/a, caches/a"),
        ((TEACHER._replace(num_classes=9),), "caches/a has logits for 9 classes.* student has 5"),
    ],
)
def test_teachers_that_do_not_suit_are_refused(name, teachers, says):
    with pytest.raises(ConfigError, match=says):
        check(METHODS[name].settings(), teachers=teachers)


def test_scales_that_are_not_recorded_are_refused():
    says = r"scales is \[1, 4\], but caches/a has scales \[1, 2\].*--set scales=\[1,2,4\]"
    with pytest.raises(ConfigError, match=says):
        check(SDKD(scales=(1, 4)))


class Flattened(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3 * 16 * 16, NUM_CLASSES)

    def forward(self, images_B3HW):
        return self.head(images_B3HW.flatten(1))


def test_a_student_without_cells_is_refused_for_cells_and_fine_without():
    with pytest.raises(UnsupportedError, match="Flattened"):
        check(SDKD(), student=Flattened())
    check(SDKD(scales=(1,)), student=Flattened())
    check(KD(), student=Flattened())
