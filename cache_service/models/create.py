"""Networks by name: timm's (and with them the CIFAR ones), torchvision's, and your own.

Whatever is wrong with a name, an argument or a file ends in one line that says so.
"""

from __future__ import annotations

import difflib
import importlib
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
from cache_service.models.weights import WeightsChoice, load_checkpoint, one_line
from cache_service.models.zoo import CIFAR_NAMES

TORCHVISION = "torchvision/"

TIMM_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes that timm resolves itself; any other name with a colon is `module:factory`."""

NUM_SUGGESTIONS = 4


def create_model(
    name: str,
    *,
    num_classes: int | None,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    checkpoint_weights: WeightsChoice | None = None,
    seed: int | None = None,
    **model_args: Any,
) -> nn.Module:
    """Build a network on the CPU, in training mode, with the weights asked for.

    Args:
        name: a timm name (`resnet50`, `resnet50.a1_in1k`, `resnet8x4`, `hf-hub:owner/name`),
            `torchvision/NAME`, or `module:factory`, a callable that returns the network.
        num_classes: classes to answer; None keeps the network's own number.
        pretrained: fetch the library's weights over the network.
        checkpoint: file with weights; see `load_checkpoint`.
        checkpoint_weights: which weights of a checkpoint that holds raw and averaged ones.
        seed: initializes the weights reproducibly; the global generator is not touched.
        model_args: passed on to the network's constructor.

    Raises:
        ConfigError: in one line, naming what is wrong.
    """
    if pretrained and checkpoint is not None:
        raise ConfigError(
            f"{name}: pretrained and checkpoint {checkpoint} both name its weights.",
            hint="Keep one of them.",
        )
    options = dict(model_args)
    if num_classes is not None:
        options["num_classes"] = num_classes
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            # Not torch.manual_seed: that would reseed the GPUs' generators for good.
            torch.default_generator.manual_seed(seed)
        model = _build(name, pretrained, options)
    if checkpoint is not None:
        load_checkpoint(model, checkpoint, weights=checkpoint_weights)
    return model


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
    return model


def _from_timm(name: str, pretrained: bool, options: dict[str, Any]) -> object:
    if not name.startswith(TIMM_SOURCES):
        known = timm.is_model(name.partition(".")[0])
        # A slash is left to timm, which explains where it may stand.
        if not known and "/" not in name:
            raise _unknown(name, timm.list_models())
        if known and pretrained and not timm.is_model_pretrained(name):
            raise ConfigError(
                f"timm has no pretrained weights for {name}.",
                hint="Give checkpoint: FILE, or another name.",
            )
    with _in_one_line(name, pretrained):
        return timm.create_model(name, pretrained=pretrained, **options)


def _from_torchvision(name: str, pretrained: bool, options: dict[str, Any]) -> object:
    known = list_models(module=torchvision_models)
    bare = name.removeprefix(TORCHVISION)
    if bare not in known:
        raise _unknown(name, [TORCHVISION + each for each in known])
    if not pretrained:
        with _in_one_line(name, pretrained):
            return get_model(bare, weights=None, **options)
    weights = get_model_weights(bare)["DEFAULT"]
    trained, asked = len(weights.meta["categories"]), options.pop("num_classes", None)
    if asked not in (None, trained):
        raise ConfigError(
            f"the pretrained {name} answers {trained} classes, not {asked}.",
            hint=f"Drop pretrained, or use timm's network of this kind with num_classes: {asked}.",
        )
    with _in_one_line(name, pretrained):
        return get_model(bare, weights=weights, **options)


def _from_factory(name: str, pretrained: bool, options: dict[str, Any]) -> object:
    module_name, _, factory_name = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"model {name!r} cannot be imported: {one_line(error)}",
            hint="Write module:factory, with the module on PYTHONPATH.",
        ) from error
    with _in_one_line(name, pretrained):
        return factory(**options, **({"pretrained": True} if pretrained else {}))


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    """Refuse a name; suggest those that contain it, ours first, then those spelled like it."""
    asked = name.partition(".")[0].lower()
    inside = [each for each in known if asked and asked in each]
    inside.sort(key=lambda each: (each not in CIFAR_NAMES, len(each)))
    spelled = difflib.get_close_matches(asked, known, n=NUM_SUGGESTIONS)
    nearest = list(dict.fromkeys([*inside[:NUM_SUGGESTIONS], *spelled]))[:NUM_SUGGESTIONS]
    hint = f"Close to it: {', '.join(nearest)}. " if nearest else ""
    return ConfigError(
        f"there is no model {name!r}.",
        hint=hint + "Models are timm's names, torchvision/NAME, hf-hub:owner/name, module:factory.",
    )


@contextmanager
def _in_one_line(name: str, pretrained: bool) -> Iterator[None]:
    """Turn what a foreign constructor or download raises into one line.

    What it prints (torch announces downloads, research code its settings) goes to stderr: stdout
    belongs to the command's own report.
    """
    try:
        with redirect_stdout(sys.stderr):
            yield
    except OSError as error:
        what = "fetch the pretrained weights of" if pretrained else "create"
        raise ConfigError(
            f"cannot {what} {name}: {one_line(error)}",
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
