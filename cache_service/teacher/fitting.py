"""Fits a teacher's input and answers to what is recorded, measured on the network itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.format.spec import Preprocess
from cache_service.models.answers import (
    AnswerReader,
    ask_unread,
    look_like_probabilities,
    read_answers,
)
from cache_service.models.probe import Fed, anchor_of, answers_when_fed, probe, probing
from cache_service.teacher.settings import TeacherConfig

MIN_NUMBERS = 16
"""Fewest answers to random images that show whether a network ends in a sigmoid."""


def fit_input(config: TeacherConfig, model: nn.Module, preprocess: Preprocess) -> Fed:
    """What the network is fed. It computes in float32 from here on, whatever its weights were.

    A network that cannot run in the channels-last memory format, because it uses `Tensor.view`,
    runs in the other one: the numbers are the same.
    """
    read_answers(model, AnswerReader(f"teacher {config.model}", "teacher", config.output))
    fed = Fed(preprocess.size, preprocess.channels, config.channels_last)
    if anchor_of(model).dtype != torch.float32 and not answers_when_fed(model, fed):
        model.float()  # exact for float16 and bfloat16
    other = fed._replace(channels_last=False)
    if fed.channels_last and not answers_when_fed(model, fed) and answers_when_fed(model, other):
        return other
    return fed


def fit_answers(config: TeacherConfig, model: nn.Module, fed: Fed) -> int:
    """Makes the network answer logits, and counts them.

    Raises:
        ConfigError: it does not take its input, or `teacher.output` chooses where there is nothing
            to choose from.
        UnsupportedError: it answers no logits, or probabilities where logits are expected, or the
            other way round.
    """
    answer_BC = probe(model, fed)
    if config.output is not None and _returns_one_tensor(model, fed):
        raise ConfigError(
            f"teacher.output is {config.output!r}, but teacher {config.model} answers one tensor.",
            hint="Leave teacher.output out.",
        )
    _check_kind(config, answer_BC)
    if config.answers == "probabilities":
        reader = AnswerReader(f"teacher {config.model}", "teacher", config.output, config.answers)
        read_answers(model, reader)
    return answer_BC.shape[1]


def _lie_between_0_and_1(answer_BC: Tensor) -> bool:
    """Of many numbers: a few logits may lie there by chance."""
    return answer_BC.numel() >= MIN_NUMBERS and bool(((answer_BC > 0) & (answer_BC < 1)).all())


def _returns_one_tensor(model: nn.Module, fed: Fed) -> bool:
    with probing(model):
        return isinstance(ask_unread(model, fed.images(anchor_of(model))), Tensor)


def _check_kind(config: TeacherConfig, answer_BC: Tensor) -> None:
    probabilities = look_like_probabilities(answer_BC)
    if probabilities and config.answers is None:
        raise UnsupportedError(
            f"teacher {config.model} answers probabilities (numbers from 0 to 1 that sum to 1 in "
            "every row), and logits are recorded.",
            hint="Set teacher.answers: probabilities to record their logarithm, or return what "
            "goes into the softmax.",
        )
    if config.answers is None and _lie_between_0_and_1(answer_BC):
        raise UnsupportedError(
            f"teacher {config.model} answers numbers from 0 to 1 only, as a sigmoid does, and "
            "logits are recorded.",
            hint="Return what goes into the sigmoid, or set teacher.answers: logits to record "
            "these numbers as they are.",
        )
    if not probabilities and config.answers == "probabilities":
        low, high = float(answer_BC.min()), float(answer_BC.max())
        raise UnsupportedError(
            f"teacher.answers is probabilities, but teacher {config.model} answers numbers from "
            f"{low:.3g} to {high:.3g}, which do not sum to 1 in every row.",
            hint="Leave teacher.answers out if these are logits or logarithms of probabilities.",
        )
