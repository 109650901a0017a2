"""`specialist`: some classes and a dustbin, from labels and from a generalist."""

from __future__ import annotations

import math

import pytest
import torch
from support.steps import images_of, memory, settings_of, terms_of
from support.streams import plain_net


@pytest.fixture
def model():
    torch.manual_seed(3)
    net = plain_net()
    with torch.no_grad():
        net.head.weight.mul_(10)
    return net


def softmax(row, temperature=1.0):
    weights = [math.exp(z / temperature) for z in row]
    return [weight / math.fsum(weights) for weight in weights]


def fold(p, classes):
    return [p[c] for c in classes] + [math.fsum(p[c] for c in range(len(p)) if c not in classes)]


@pytest.mark.parametrize("classes", [(1, 3), (4, 0, 2)])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_it_is_its_formula_written_out(model, classes, temperature):
    stream = memory()
    batch = stream.batch(0)
    settings = settings_of("specialist", classes=classes, temperature=temperature, alpha=0.3)
    terms, metrics = terms_of(settings, stream, model)
    hard, soft, right = [], [], []
    student_BC, teacher_BC = model(images_of(stream)), batch.rows[0]["logits"][:, 0]
    rows = zip(student_BC.tolist(), teacher_BC.tolist(), batch.labels_B.tolist(), strict=True)
    for z, v, label in rows:
        # At use the student's outputs are its classes and one for all others.
        dustbin = math.log(math.fsum(math.exp(z[c]) for c in range(5) if c not in classes))
        outputs = [z[c] for c in classes] + [dustbin]
        place = classes.index(label) if label in classes else len(classes)
        hard.append(-math.log(softmax(outputs)[place]))
        right.append(max(range(len(outputs)), key=outputs.__getitem__) == place)
        p, q = (fold(softmax(each, temperature), classes) for each in (v, z))
        soft.append(
            temperature**2 * math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        )
    assert terms["label"].item() == pytest.approx(0.7 * sum(hard) / 8, rel=2e-5)
    assert terms["soft"].item() == pytest.approx(0.3 * sum(soft) / 8, rel=2e-5)
    assert metrics["top1"].item() == pytest.approx(sum(right) / 8)


@pytest.mark.parametrize("temperature", [1, 4, 20])
def test_one_that_starts_as_the_generalist_has_nothing_to_learn_from_it(model, temperature):
    stream = memory()
    answer_BC = model(images_of(stream)).detach()
    stream.teacher_logits = lambda *_, **__: answer_BC.unsqueeze(1)
    terms, _ = terms_of(settings_of("specialist", temperature=temperature), stream, model)
    assert terms["soft"].item() == pytest.approx(0.0, abs=1e-5)


def test_what_lies_outside_is_told_apart_by_nothing(model):
    """Moving weight between two classes of the dustbin changes no loss."""
    stream = memory()
    settings = settings_of("specialist", classes=(1, 3), temperature=1)
    before, _ = terms_of(settings, stream, model)

    class Swapped(torch.nn.Module):
        def forward(self, images_B3HW):
            return model(images_B3HW)[:, [4, 1, 0, 3, 2]]

    after, _ = terms_of(settings, stream, Swapped())
    torch.testing.assert_close(after, before)


def test_all_classes_but_one_is_kd(model):
    # The dustbin holds one class: nothing is folded.
    stream, order = memory(), [0, 1, 2, 3]
    found, _ = terms_of(settings_of("specialist", classes=order, alpha=0.9), stream, model)
    wanted, _ = terms_of(settings_of("kd", temperature=4, alpha=0.9), stream, model)
    torch.testing.assert_close(found, wanted)
