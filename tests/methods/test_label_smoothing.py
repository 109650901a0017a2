"""Smoothing spreads a share of the label over all classes, and leaves soft targets alone."""

from __future__ import annotations

import pytest
import torch
from support import formulas
from support.steps import images_of, memory, settings_of, terms_of
from support.streams import plain_net

from cache_service.models.preprocess import prepare_views
from distill.losses import dustbin_logits
from distill.methods import METHODS

SMOOTHING = 0.2
OWN_LABELS = {"ps-kd"}
"""Their label is no term of its own: it is part of the soft target, and tested with it."""


def smoothed(logits_BC, batch, smoothing):
    everywhere = -formulas.softmax(logits_BC).log().mean()
    return (1 - smoothing) * formulas.label(logits_BC, batch) + smoothing * everywhere


@pytest.fixture
def model():
    torch.manual_seed(3)
    net = plain_net()
    with torch.no_grad():
        net.head.weight.mul_(10)  # sure enough for smoothing to matter
    return net


@pytest.mark.parametrize("name", sorted(METHODS.keys() - OWN_LABELS))
def test_only_label_terms_are_smoothed_and_by_the_formula(model, name):
    stream = memory()
    settings, batch, peer = settings_of(name), stream.batch(0), plain_net()
    plain, _ = terms_of(settings, stream, model, others=[peer])
    found, _ = terms_of(settings, stream, model, others=[peer], smoothing=SMOOTHING)
    second = batch.other_views["second_view"]
    second = prepare_views(second.images_BHW3, stream.seen, device="cpu")
    answers = {"label_b": model(second)}
    labels = {term for term in found if term.startswith("label")}
    for term in labels:
        logits_BC = answers.get(term, model(images_of(stream))).detach()
        seen = batch
        if name == "specialist":
            subset = torch.tensor(settings.classes)
            places = [
                settings.classes.index(label) if label in settings.classes else len(subset)
                for label in batch.labels_B.tolist()
            ]
            seen = batch._replace(
                labels_B=torch.tensor(places), partner_labels_B=torch.tensor(places)
            )
            logits_BC = dustbin_logits(logits_BC, subset)
        weight = plain[term].double() / smoothed(logits_BC, seen, 0.0)
        wanted = weight * smoothed(logits_BC, seen, SMOOTHING)
        torch.testing.assert_close(found[term].double(), wanted, rtol=2e-5, atol=1e-6)
        assert abs(found[term] - plain[term]) > 1e-3
    assert labels
    for term in found.keys() - labels:
        torch.testing.assert_close(found[term], plain[term], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ce", "kd", "sd-dkd", "soft"])
def test_both_labels_of_a_mixed_view_are_smoothed(model, name):
    stream = memory(mixed=True)
    plain, _ = terms_of(settings_of(name), stream, model)
    found, _ = terms_of(settings_of(name), stream, model, smoothing=SMOOTHING)
    batch, logits_BC = stream.batch(0), model(images_of(stream)).detach()
    weight = plain["label"].double() / smoothed(logits_BC, batch, 0.0)
    wanted = weight * smoothed(logits_BC, batch, SMOOTHING)
    torch.testing.assert_close(found["label"].double(), wanted, rtol=2e-5, atol=1e-6)
