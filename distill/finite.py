"""Stops a run if a loss or a weight is NaN or infinite. The error names step and samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import NonFiniteError
from distill.batches import Cursor
from distill.ranks import ONE_PROCESS, Ranks
from distill.reporting import Named

MAX_PENDING = 64
"""Batches between checks on a GPU. A check after every batch would stall the GPU at each step."""

MAX_SAMPLES_NAMED = 16
"""Number of samples that an error message lists."""


ADVICE = "Lower optimizer.lr or set clip_grad_norm."

_NEVER = 2**62


class _Entry(NamedTuple):
    student: str
    cursor: Cursor
    samples_B: Tensor
    values: Named


class NonFiniteCheck:
    """Checks every loss for NaN and infinity.

    On a CPU each loss is checked before it is used. On a GPU losses are collected and checked
    together, at the latest before anything is reported or saved. At that time the model in memory
    may have non-finite weights, but no file has them. The message still names the first step with
    a non-finite loss.

    Several processes collect the losses on CPUs as well. They check them at the same step, so all
    of them stop if one of them has a non-finite loss.
    """

    def __init__(self, device: torch.device, ranks: Ranks = ONE_PROCESS) -> None:
        self._collects = device.type != "cpu" or ranks.world > 1
        self._ranks = ranks
        self._pending: list[_Entry] = []

    def add(self, cursor: Cursor, samples_B: Tensor, values: Named, *, student: str = "") -> None:
        """Add the losses of a batch.

        Args:
            cursor: the place of the batch in the run.
            samples_B: its samples, preferably on the CPU, where reading them needs no transfer.
            values: losses and other values that must be finite.
            student: name of the student; empty if the run has only one.

        Raises:
            NonFiniteError: one of these or of the earlier values is NaN or infinite.
        """
        self._pending.append(_Entry(student, cursor, samples_B, values))
        if not self._collects or len(self._pending) >= MAX_PENDING:
            self.check()

    def check(self) -> None:
        """Check everything added so far.

        Raises:
            NonFiniteError: a value is not finite. The message names the first such step,
                its samples and its losses.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        # One concatenated vector, so that the CPU waits for the GPU only once.
        row = iter(torch.cat([entry.values.values_V for entry in pending]).tolist())
        first_bad = None
        for entry in pending:
            # `names` must come first: zip then stops before it takes a value of the next entry.
            values = dict(zip(entry.values.names, row, strict=False))
            if first_bad is None and not all(map(math.isfinite, values.values())):
                first_bad = entry, values
        step = _NEVER if first_bad is None else first_bad[0].cursor.step
        first = self._ranks.smallest(step)
        if first == _NEVER:
            return
        if first_bad is not None and step == first:
            raise _refusal(*first_bad)
        raise NonFiniteError(
            f"the loss of step {first} is not finite on another process, which names the samples.",
            hint=ADVICE,
        )


def refuse_non_finite_weights(model: nn.Module, step: int, *, student: str = "") -> None:
    """Refuse weights that are not finite, before they are saved.

    A gradient can be NaN although the loss is finite, such as that of a square root at 0. The loss
    becomes NaN one step later, and a checkpoint may be written in between.

    Raises:
        NonFiniteError: a weight is not finite. The message names the step and a parameter.
    """
    finite = [parameter.detach().isfinite().all() for parameter in model.parameters()]
    # One stacked tensor, so that a GPU is synchronized once and not per parameter.
    if bool(torch.stack(finite).all()):
        return
    name = next(name for name, p in model.named_parameters() if not bool(p.isfinite().all()))
    owner = f"student {student}" if student else "the student"
    raise NonFiniteError(
        f"the weights of {owner} are not finite after step {step} (first in {name}), "
        "although every loss was: a gradient was not.",
        hint="Lower optimizer.lr or set clip_grad_norm, then run the same command: it resumes "
        "from the last checkpoint.",
    )


def _refusal(entry: _Entry, values: dict[str, float]) -> NonFiniteError:
    cursor, owner = entry.cursor, f"student {entry.student} at " if entry.student else ""
    terms = ", ".join(
        f"{name}={value:g}"
        for name, value in values.items()
        if "loss" in name or not math.isfinite(value)
    )
    samples = entry.samples_B.tolist()
    named = ", ".join(str(sample) for sample in samples[:MAX_SAMPLES_NAMED])
    rest = len(samples) - MAX_SAMPLES_NAMED
    more = f" and {rest} more" if rest > 0 else ""
    return NonFiniteError(
        f"the loss of {owner}step {cursor.step} is not finite ({terms}); epoch {cursor.epoch}, "
        f"seed {cursor.seed}, positions [{cursor.start}, {cursor.stop}), samples {named}{more}. "
        "The last checkpoint is from before.",
        hint=ADVICE,
    )
