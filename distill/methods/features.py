"""A student's logits together with its global features: what its classifier reads.

Shape letters: B batch, C classes, D channels.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import UnsupportedError
from cache_service.models.features import describe
from distill.methods.method import MethodSettings, RunFacts


class Features(NamedTuple):
    """What a student answers, and from what."""

    logits_BC: Tensor
    features_BD: Tensor


def answer_with_features(student: nn.Module, images_B3HW: Tensor) -> Features:
    """Logits and the classifier's input, from one forward pass.

    Raises:
        UnsupportedError: the network has no classifier that can be found, or runs it not once.
    """
    layer, seen = _classifier(student), []

    def note(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])

    handle = layer.register_forward_pre_hook(note)
    try:
        logits_BC: Tensor = student(images_B3HW)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise UnsupportedError(
            f"{describe(student)} ran its classifier {len(seen)} times where 1 is needed."
        )
    return Features(logits_BC, seen[0].flatten(1))


def needs_features(settings: MethodSettings, facts: RunFacts) -> None:
    """A check: the student's logits are those of one linear layer on pooled features."""
    # A copy, because batch norms of the student would take in what it is probed with.
    student = copy.deepcopy(facts.student).eval()
    layer = _classifier(student)
    side, weight = facts.input_size, layer.weight
    images_B3HW = torch.zeros(2, 3, side, side, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        logits_BC, features_BD = answer_with_features(student, images_B3HW)
        weight_CD = layer.weight.flatten(1)
        fits = features_BD.shape[1] == weight_CD.shape[1]
        if fits:
            bias = 0 if layer.bias is None else layer.bias
            fits = torch.allclose(features_BD @ weight_CD.T + bias, logits_BC, 1e-3, 1e-3)
    if not fits:
        raise UnsupportedError(
            f"method {settings.name} compares the features that the student classifies, but the "
            f"logits of {describe(student)} are more than one linear layer on them.",
            hint="Choose a network with one linear classifier, such as resnet18.",
        )


def _classifier(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """The classifier that the network names, else its last linear layer."""
    name_it = getattr(model, "get_classifier", None)
    named = name_it() if callable(name_it) else None
    if isinstance(named, nn.Linear | nn.Conv2d):
        return named
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UnsupportedError(f"{describe(model)} has no linear classifier.")
    return layers[-1]
