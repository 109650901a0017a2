"""The registry, and what every method's terms have in common."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from support.steps import REQUIRED, images_of, settings_of, terms_of
from support.streams import MemoryStream, plain_net, train_config

from distill.methods import METHODS, MethodConfig, method_of


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
