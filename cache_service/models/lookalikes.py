"""Names that mean two networks: one for ImageNet, and one of the papers for 32 x 32 images.

timm's and torchvision's `resnet18` begin with a 7x7 convolution and max pooling; the ResNet18 of
the CIFAR papers does not. So a checkpoint may fit the other one, and a student for small images may
be the wrong one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torchvision import models as torchvision_models
from torchvision.models import (  # type: ignore[attr-defined]  # public, but not re-exported
    get_model,
    list_models,
)

from cache_service.models.zoo import CIFAR_NAMES

TORCHVISION = "torchvision/"

IMAGENET_FORMS = {
    "cifar_resnet18": ("resnet18",),
    "cifar_preact_resnet18": ("resnet18",),
    "cifar_resnet50": ("resnet50",),
    "cifar_vgg11": ("vgg11", "vgg11_bn"),
    "cifar_vgg13": ("vgg13", "vgg13_bn"),
    "cifar_vgg16": ("vgg16", "vgg16_bn"),
    "cifar_vgg19": ("vgg19", "vgg19_bn"),
    "cifar_mobilenetv2": ("mobilenetv2_050", "mobilenetv2_100", "mobilenet_v2"),
    "cifar_shufflenetv2": ("shufflenet_v2_x1_0",),
}
"""Networks of timm and torchvision that go by the name of a CIFAR network."""

SMALL_SIDE = 64
"""Views in px below which an ImageNet network is worth a notice: its map has 1 x 1 or 2 x 2."""


class Lookalike(NamedTuple):
    """Another network that weights fit, and how many classes it then answers."""

    name: str
    num_classes: int


def find_lookalikes(weights: Mapping[str, Tensor], asked: str) -> list[Lookalike]:
    """Networks that weights fit but for the number of classes.

    Looked at are the one that was asked for, which may have another number of classes, and its
    namesakes; if they do not fit, the CIFAR networks.

    Args:
        weights: the state dict, without prefixes.
        asked: the model that was asked for.
    """
    found = [each for name in [asked, *_namesakes(asked)] if (each := _fit(weights, name))]
    if found:
        return found
    return [each for name in CIFAR_NAMES if (each := _fit(weights, name))]


def small_image_notice(name: str, side: int) -> str | None:
    """What to say of a new student that is an ImageNet network while the images are small.

    Args:
        name: the student's model.
        side: of the images, px.
    """
    bare = _bare(name)
    papers = [cifar for cifar, forms in IMAGENET_FORMS.items() if bare in forms]
    if side >= SMALL_SIDE or not papers:
        return None
    return (
        f"student {name} is the network for ImageNet, which reduces {side} px images to a tiny "
        f"map. The network of this name in the CIFAR papers is {papers[0]}."
    )


def _bare(name: str) -> str:
    """The name without its library and without timm's tag of weights."""
    return name.removeprefix(TORCHVISION).partition(".")[0].lower()


def _namesakes(asked: str) -> Iterator[str]:
    bare = _bare(asked)
    names = [cifar for cifar, forms in IMAGENET_FORMS.items() if bare in forms]
    names += [bare, f"cifar_{bare}", *IMAGENET_FORMS.get(bare, ())]
    known = list_models(module=torchvision_models)
    for name in dict.fromkeys(names):
        if timm.is_model(name) and name != asked:
            yield name
        if name in known and TORCHVISION + name != asked:
            yield TORCHVISION + name


def _fit(weights: Mapping[str, Tensor], name: str) -> Lookalike | None:
    """Whether weights fit a network in all but the outputs of one layer, its classifier."""
    expected, num_outputs = _measure(name)
    optional = {key for key in expected if key.endswith(".num_batches_tracked")}
    if not weights or not expected.keys() - optional <= weights.keys() <= expected.keys():
        return None
    if all(weights[key].shape == expected[key] for key in weights):
        return Lookalike(name, num_outputs)
    other = other_outputs(weights, expected)
    return None if other is None else Lookalike(name, other)


def other_outputs(weights: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> int | None:
    """The outputs of the one layer in which weights differ from a network's shapes, if so.

    Such weights are of the same network with another number of classes.
    """
    other = [key for key in weights if weights[key].shape != expected[key]]
    layers = {key.rpartition(".")[0] for key in other}
    rows = {
        tuple(value.shape[:1]) for key, value in weights.items() if key.rpartition(".")[0] in layers
    }
    same_inputs = all(weights[key].shape[1:] == expected[key][1:] for key in other)
    if len(layers) != 1 or len(rows) != 1 or not same_inputs:
        return None
    return next(iter(rows))[0]


@lru_cache(maxsize=256)
def _measure(name: str) -> tuple[dict[str, torch.Size], int]:
    """Shapes of the state dict of a library's network, and its outputs; none for other names."""
    bare = name.removeprefix(TORCHVISION)
    network: object = None
    with torch.device("meta"), suppress(RuntimeError, ValueError, TypeError):
        if bare != name and bare in list_models(module=torchvision_models):
            network = get_model(bare, weights=None)
        elif timm.is_model(name.partition(".")[0]) and ":" not in name:
            network = timm.create_model(name)
    if not isinstance(network, nn.Module):
        return {}, 0
    linear = [each for each in network.modules() if isinstance(each, nn.Linear)]
    shapes = {key: value.shape for key, value in network.state_dict().items()}
    return shapes, linear[-1].out_features if linear else 0
