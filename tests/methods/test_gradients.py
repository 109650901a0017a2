"""What a method learns from is its loss: gradients against finite differences, in float64."""

from __future__ import annotations

import pytest
import torch
from support.steps import MemoryHistory, memory, settings_of, terms_of
from support.streams import PlainNet
from support.toys import NUM_CLASSES

from distill.methods import METHODS

EPOCH = 3.0
"""Within every warm-up, and with an epoch before it."""

OTHERS = [
    ("kd", {"standardize": True}),
    ("dkd", {"standardize": True}),
    ("sd-kd", {"standardize": True}),
    ("nkd", {"classes": "all"}),
    ("sd-nkd", {"classes": "others"}),
    ("soft", {"direction": "reverse"}),
    ("soft", {"standardize": True}),
    ("ensemble", {"mean": "geometric"}),
    ("tf-kd", {"form": "self"}),
    ("ddgsd", {"mmd": 1.0}),
    ("specialist", {"classes": (4, 0, 2)}),
    ("peers", {"teacher_weight": 1.0}),
]
REFUSE_MIXED = {"ddgsd", "ps-kd", "cs-kd", "specialist"}
EVERY = [
    (name, written, mixed)
    for name, written in [*((name, {}) for name in METHODS), *OTHERS]
    for mixed in (False, True)
    if not (mixed and name in REFUSE_MIXED)
]


class Wide(PlainNet):
    """A student in float64, whose logits are constant where no gradients are recorded."""

    def __init__(self):
        super().__init__(NUM_CLASSES)
        self.double()
        self.start = None

    def forward_features(self, images_B3HW):
        if self.start is not None and not torch.is_grad_enabled():
            # The logits of a pair are a constant of the loss: they do not move with the weights.
            weight, bias = self.start[:2]
            return torch.nn.functional.conv2d(
                images_B3HW.double(), weight, bias, stride=2, padding=1
            ).tanh()
        return super().forward_features(images_B3HW.double())

    def forward_head(self, map_BDHW):
        if self.start is not None and not torch.is_grad_enabled():
            weight, bias = self.start[2:]
            return torch.nn.functional.linear(map_BDHW.mean(dim=(2, 3)), weight, bias)
        return super().forward_head(map_BDHW)


@pytest.mark.parametrize(("name", "written", "mixed"), EVERY, ids=str)
def test_the_gradient_of_a_method_is_that_of_its_value(name, written, mixed):
    torch.manual_seed(1)
    settings = settings_of(name, **written)
    stream = memory(mixed=mixed, num_teachers=2 if name in {"soft", "hard", "ensemble"} else 1)
    model, peer, history = Wide(), Wide(), MemoryHistory()
    history.write(2, stream.batch(0).samples_B, torch.randn(8, NUM_CLASSES, dtype=torch.float64))
    weights = list(model.parameters())
    model.start = [weight.detach().clone() for weight in weights]

    def loss(step=0.0, along=None):
        with torch.no_grad():
            for place, (weight, start) in enumerate(zip(weights, model.start, strict=True)):
                weight.copy_(start if along is None else start + step * along[place])
        terms, _ = terms_of(
            settings,
            stream,
            model,
            epoch=EPOCH,
            epochs=5,
            smoothing=0.1,
            others=[peer],
            history=history,
        )
        return sum(terms.values())

    slope = torch.autograd.grad(loss(), weights)
    for _ in range(3):
        along = [torch.randn_like(weight) for weight in weights]
        measured = (loss(1e-5, along) - loss(-1e-5, along)).item() / 2e-5
        parts = zip(slope, along, strict=True)
        predicted = sum((part * step).sum() for part, step in parts).item()
        assert abs(measured) > 1e-4
        assert predicted == pytest.approx(measured, rel=1e-5)
