"""Methods on cells: which cells are compared, and how those of the student are pooled."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from support.steps import images_of, terms_of
from support.streams import MemoryStream, plain_net, train_config

from cache_service.models.features import cell_logits
from distill.methods.kd import KD
from distill.methods.scale_decoupled import SDKD, select_cells


@pytest.fixture
def stream():
    return MemoryStream(train_config("unused", batch_size=8))


@pytest.fixture
def model():
    torch.manual_seed(3)
    return plain_net()


def kl_rows(teacher, student, temperature):
    p = F.softmax(teacher.double() / temperature, -1)
    log_q = F.log_softmax(student.double() / temperature, -1)
    return temperature**2 * (p * (p.log() - log_q)).sum(-1)


def test_a_mixed_view_is_judged_by_its_larger_part(model):
    stream = MemoryStream(train_config("unused", batch_size=8), mixed=True)
    _, metrics = terms_of(SDKD(), stream, model)
    batch = stream.batch(0)
    larger_B = torch.where(batch.weights_B >= 0.5, batch.labels_B, batch.partner_labels_B)

    def fraction(labels_B):
        right_BR = batch.rows[0]["logits"].argmax(-1) == labels_B[:, None]
        return (right_BR != right_BR[:, :1]).float().mean()

    assert fraction(larger_B) != fraction(batch.labels_B)
    assert metrics["complementary"] == fraction(larger_B)


def test_the_fraction_of_complementary_cells_does_not_depend_on_their_weight(stream, model):
    fractions = {
        terms_of(SDKD(complementary_weight=weight), stream, model)[1]["complementary"].item()
        for weight in (0.0, 0.5, 1.0, 2.0)
    }
    assert len(fractions) == 1


def test_sd_kd_on_the_whole_image_alone_is_kd(stream, model):
    sdd, _ = terms_of(SDKD(scales=(1,)), stream, model)
    plain, _ = terms_of(KD(), stream, model)
    torch.testing.assert_close(sdd, plain)


@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 4), (1, 2, 4)])
def test_a_subset_of_scales_takes_exactly_their_cells(scales):
    recorded = (1, 2, 4)
    names = [f"{side}:{cell}" for side in recorded for cell in range(side * side)]
    cells_BRC = torch.arange(len(names)).reshape(1, -1, 1)
    taken = [names[index] for index in select_cells(cells_BRC, recorded, scales)[0, :, 0]]
    assert taken == [f"{side}:{cell}" for side in scales for cell in range(side * side)]
    assert len(taken) == list(accumulate(side * side for side in scales))[-1]


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
