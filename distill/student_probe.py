"""Asks a student for random images before a run, in evaluation and in training mode.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cache_service.errors import ConfigError, KdCacheError, UnsupportedError
from cache_service.format.spec import Preprocess
from cache_service.models.answers import (
    AnswerReader,
    ask_unread,
    look_like_probabilities,
    read_answers,
)
from cache_service.models.features import name_map
from cache_service.models.probe import (
    Fed,
    anchor_of,
    answers_when_fed,
    layout_hint,
    probe,
    where_it_failed,
)
from distill.config import StudentConfig


def read_student(config: StudentConfig, model: nn.Module) -> AnswerReader:
    """Make the student answer logits, whatever it returns otherwise."""
    reader = AnswerReader(f"student {config.model}", "student", config.output)
    read_answers(model, reader)
    return reader


def probe_student(
    config: StudentConfig, model: nn.Module, preprocess: Preprocess, *, num_classes: int
) -> None:
    """Refuse a student that cannot be trained. Its weights, modes and buffers stay as they are.

    Args:
        config: section `student` of the train file.
        model: the network, on the CPU.
        preprocess: of its input.
        num_classes: of the dataset.

    Raises:
        ConfigError: its input, its number of classes or a setting does not fit.
        UnsupportedError: it does not answer logits, or answers others in training.
    """
    reader = read_student(config, model)
    fed = Fed(preprocess.size, preprocess.channels)
    answer_BC = probe(model, fed)
    if answer_BC.shape[1] != num_classes:
        raise ConfigError(
            f"{reader.who} answers {answer_BC.shape[1]} classes and the dataset has {num_classes}.",
            hint="Let its factory use num_classes, or set student.model_args.",
        )
    if look_like_probabilities(answer_BC):
        raise UnsupportedError(
            f"{reader.who} answers probabilities (numbers from 0 to 1 that sum to 1 in every row), "
            "and losses take logits.",
            hint="Return what goes into the softmax.",
        )
    _check_training(model, fed, reader)
    name_map(model, fed, feature_map=config.feature_map, classifier=config.classifier)


def require_channels_last(config: StudentConfig, model: nn.Module, preprocess: Preprocess) -> None:
    """Refuse a student that uses `Tensor.view` where the channels-last format is set.

    Raises:
        ConfigError: names the setting.
    """
    fed = Fed(preprocess.size, preprocess.channels, channels_last=True)
    if not answers_when_fed(model, fed):
        raise ConfigError(
            f"student {config.model} does not take images in the channels-last memory format.",
            hint=layout_hint("student"),
        )


def _check_training(model: nn.Module, fed: Fed, reader: AnswerReader) -> None:
    """In training mode it answers logits, from all parameters that matter in evaluation."""
    raw = {training: _returned(model, fed, reader, training=training) for training in (True, False)}
    logits_BC = reader.read(raw[True])
    if reader.output is not None and all(isinstance(each, Tensor) for each in raw.values()):
        raise ConfigError(
            f"student.output is {reader.output!r}, but {reader.who} answers one tensor.",
            hint="Leave student.output out.",
        )
    if isinstance(raw[True], Tensor):
        return
    trained, used = _reached(logits_BC), _reached(reader.read(raw[False]))
    if trained is None or used is None:
        return
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    missing = [name for key, name in names.items() if key in used - trained]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UnsupportedError(
            f"{reader.who} answers several tensors in training, and in evaluation it uses "
            f"{missing[0]}{more}, which the chosen one does not train.",
            hint="Set student.output: mean to train all of its heads, or choose another output.",
        )


def _returned(model: nn.Module, fed: Fed, reader: AnswerReader, *, training: bool) -> object:
    """What the network itself returns, with gradients, in one of its modes."""
    with _untouched(model):
        model.train(training)
        try:
            return ask_unread(model, fed.images(anchor_of(model)))
        except (torch.OutOfMemoryError, KdCacheError):
            raise
        except Exception as error:
            raise ConfigError(
                f"{reader.who} answers {fed.size} x {fed.size} px images in evaluation, but cannot "
                f"be trained on them: {where_it_failed(error)}",
                hint="Set student.input_size to a larger one if an auxiliary head needs it, or "
                "switch that head off in student.model_args.",
            ) from error


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Puts modes, buffers and the generator of random numbers back."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def _reached(logits_BC: Tensor) -> set[int] | None:
    """Ids of the parameters that the logits depend on; None if recomputation hides them."""
    found: set[int] = set()
    nodes: list[Any] = [logits_BC.grad_fn]
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "Checkpoint" in node.name():
            return None
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes.extend(after for after, _ in node.next_functions)
    return found
