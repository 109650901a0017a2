"""Makes networks by name: timm's (the CIFAR networks included), torchvision's, and your own.

Anything wrong with a name, an argument or a file is an error of one line.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torchvision import models as torchvision_models
from torchvision.models import (  # type: ignore[attr-defined]  # public, but not re-exported
    get_model,
    get_model_weights,
    list_models,
)

from cache_service.errors import ConfigError
from cache_service.human_format import one_line
from cache_service.models.checkpoint_file import WEIGHT_SUFFIXES
from cache_service.models.zoo import CIFAR_NAMES
from cache_service.plugins import call_factory, load_object

TORCHVISION = "torchvision/"

TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes that timm resolves itself; any other name with a colon is `module:factory`."""

NUM_SUGGESTIONS = 4

LIBRARIES = {"torchvision.models.": TORCHVISION, "timm/": "", "timm.": ""}
"""What people write in front of a library's name, and what this project writes."""

PAPER_NAMES = {
    "mobile_half": "mobilenetv2",
    "CIFAR_ResNet18": "preact_resnet18",
    "CIFAR_ResNet18_preActBasic": "preact_resnet18",
}
"""Names in papers' codes that are not recognized by their letters."""


def create_model(
    name: str,
    *,
    num_classes: int | None,
    pretrained: bool = False,
    seed: int | None = None,
    **model_args: Any,
) -> nn.Module:
    """Build a network on the CPU, in training mode. `load_checkpoint` gives it other weights.

    Args:
        name: a timm name (`resnet50`, `resnet50.a1_in1k`, `resnet8x4`, `hf-hub:owner/name`),
            `torchvision/NAME`, or `module:factory` or `file.py:factory`, a callable that returns
            the network.
        num_classes: classes to answer; None keeps the network's own number. A factory that does
            not take it is called without it.
        pretrained: fetch the library's weights over the network.
        seed: initializes the weights reproducibly; the global generator is not touched.
        model_args: passed on to the network's constructor.

    Raises:
        ConfigError: in one line, naming what is wrong.
    """
    options = dict(model_args)
    if num_classes is not None:
        options["num_classes"] = num_classes
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # Not torch.manual_seed: that would reseed the GPUs' generators for good.
            torch.default_generator.manual_seed(seed)
        return _build(name, pretrained, options)


def refuse_unknown_model(name: str) -> None:
    """Refuse a name that no library knows, without making the network.

    Raises:
        ConfigError: names that are close to it, or why the factory cannot be loaded.
    """
    if name.startswith(TORCHVISION):
        _refuse_unknown_torchvision(name)
    elif ":" not in name:
        _refuse_unknown_timm(name)
    elif not name.startswith(TIMM_SOURCES):
        load_object(name)


class _Scripted(nn.Module):
    """A network of TorchScript, which takes no hooks itself."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BKHW: torch.Tensor) -> Any:
        return self.network(images_BKHW)


def _build(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    if name.startswith(TORCHVISION):
        model = _from_torchvision(name, pretrained, options)
    elif ":" in name and not name.startswith(TIMM_SOURCES):
        model = _from_factory(name, pretrained, options)
    else:
        model = _from_timm(name, pretrained, options)
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{name} made a {type(model).__name__} where a torch.nn.Module is needed.",
            hint="Name a callable that returns the network.",
        )
    return _Scripted(model) if isinstance(model, torch.jit.ScriptModule) else model


def _from_timm(name: str, pretrained: bool, options: dict[str, Any]) -> object:
    if not name.startswith(TIMM_SOURCES):
        known = _refuse_unknown_timm(name)
        if known and pretrained and not timm.is_model_pretrained(name):
            raise ConfigError(
                f"timm has no pretrained weights for {name}.",
                hint="Give checkpoint: FILE, or another name.",
            )
    with _in_one_line(name, pretrained):
        return timm.create_model(name, pretrained=pretrained, **options)


def _refuse_unknown_timm(name: str) -> bool:
    """Whether timm knows the name. One with a slash may be unknown: timm itself explains those."""
    known: bool = timm.is_model(name.partition(".")[0])
    if Path(name).suffix in WEIGHT_SUFFIXES:
        raise ConfigError(
            f"model {name!r} is a file of weights, not the name of a network.",
            hint="Give the file as `checkpoint`, and as `model` the network that it is of.",
        )
    if not known and "/" not in name:
        others = list_models(module=torchvision_models) if name.startswith("torchvision.") else []
        raise _unknown(name, [*timm.list_models(), *(TORCHVISION + each for each in others)])
    return known


def _refuse_unknown_torchvision(name: str) -> str:
    """The name without its prefix."""
    known, torchvision_name = list_models(module=torchvision_models), name.removeprefix(TORCHVISION)
    if torchvision_name not in known:
        raise _unknown(name, [TORCHVISION + each for each in known])
    return torchvision_name


def _from_torchvision(name: str, pretrained: bool, options: dict[str, Any]) -> object:
    torchvision_name = _refuse_unknown_torchvision(name)
    if not pretrained:
        with _in_one_line(name, pretrained):
            return get_model(torchvision_name, weights=None, **options)
    weights = get_model_weights(torchvision_name)["DEFAULT"]
    trained, requested = len(weights.meta["categories"]), options.pop("num_classes", None)
    if requested not in (None, trained):
        raise ConfigError(
            f"the pretrained {name} answers {trained} classes, not {requested}.",
            hint="Drop pretrained, or use timm's network of this kind with "
            f"num_classes: {requested}.",
        )
    with _in_one_line(name, pretrained):
        return get_model(torchvision_name, weights=weights, **options)


def _from_factory(name: str, pretrained: bool, options: dict[str, Any]) -> object:
    if isinstance(load_object(name), nn.Module):
        raise ConfigError(
            f"model {name} is a network, not a function that makes one.",
            hint="Name a function that returns a new network.",
        )
    return call_factory(
        name,
        options | ({"pretrained": True} if pretrained else {}),
        makes="model",
        given_in="model_args",
        optional={"num_classes"},
    )


def _core(name: str) -> str:
    """What is left of a CIFAR network's name without the marks that papers' codes put on it."""
    return re.sub(r"cifar|_bn|sdd|net|[^a-z0-9]", "", PAPER_NAMES.get(name, name).lower())


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    """The error for an unknown name: names that contain it, ours first, then similar ones."""
    wanted = name.partition(".")[0].lower()
    for start, library in LIBRARIES.items():
        if name.startswith(start):
            wanted = library + name.removeprefix(start).lower()
    inside = [each for each in known if wanted and wanted in each]
    inside.sort(key=lambda each: (each not in CIFAR_NAMES, len(each)))
    spelled = difflib.get_close_matches(wanted, known, n=NUM_SUGGESTIONS)
    in_papers = [each for each in CIFAR_NAMES if each in known and _core(each) == _core(name)]
    nearest = list(dict.fromkeys([*in_papers, *inside[:NUM_SUGGESTIONS], *spelled]))
    nearest = nearest[:NUM_SUGGESTIONS]
    hint = f"Close to it: {', '.join(nearest)}. " if nearest else ""
    if name.endswith(".py"):
        hint = f"Name the function in it: {name}:FUNCTION. "
    return ConfigError(
        f"there is no model {name!r}.",
        hint=hint + "Models are timm's names, torchvision/NAME, hf-hub:owner/name, module:factory.",
    )


@contextmanager
def _in_one_line(name: str, pretrained: bool) -> Iterator[None]:
    """Turn what a constructor or a download raises into an error of one line.

    What it prints (torch announces downloads, research code its settings) goes to stderr, because
    stdout is for the command's own report.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except OSError as error:
        action = "fetch the pretrained weights of" if pretrained else "create"
        raise ConfigError(
            f"cannot {action} {name}: {one_line(error)}",
            hint="Check the connection to the model hub, or give checkpoint: FILE.",
        ) from error
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"cannot create {name}: {one_line(error)}",
            hint="Check its name, num_classes and model_args.",
        ) from error
