"""Stops a run whose loss or weights are NaN or infinite, and names the step and the samples."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import NonFiniteError
from distill.batches import Cursor
from distill.reporting import Named

MAX_PENDING = 64
"""Losses that may be unchecked on a GPU: checking each at once would stall it at every step."""

MAX_SAMPLES_NAMED = 16
"""In a message."""


class _Entry(NamedTuple):
    student: str
    cursor: Cursor
    samples_B: Tensor
    values: Named


class NonFiniteCheck:
    """Checks every loss for NaN and infinity.

    On a CPU each loss is checked before it is used. On a GPU they are collected and checked
    together, at the latest before anything is reported or saved: by then the model in memory may
    have non-finite weights, but no file has, and the message names the first such step all the
    same.
    """

    def __init__(self, device: torch.device) -> None:
        self._collects = device.type != "cpu"
        self._pending: list[_Entry] = []

    def add(self, cursor: Cursor, samples_B: Tensor, values: Named, *, student: str = "") -> None:
        """Add the losses of a batch.

        Args:
            cursor: where the batch is in the run.
            samples_B: its samples; best still on the CPU.
            values: losses, and whatever else must be finite.
            student: whose; empty where there is only one.

        Raises:
            NonFiniteError: one of them, or of those added before, is NaN or infinite.
        """
        self._pending.append(_Entry(student, cursor, samples_B, values))
        if not self._collects or len(self._pending) >= MAX_PENDING:
            self.check()

    def check(self) -> None:
        """Check everything added so far.

        Raises:
            NonFiniteError: names the first non-finite step, its samples and its terms.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        # In one vector, because students may report different values: one wait for all.
        row = iter(torch.cat([entry.values.values_V for entry in pending]).tolist())
        for entry in pending:
            values = dict(zip(entry.values.names, row, strict=False))
            if not all(map(math.isfinite, values.values())):
                raise _refusal(entry, values)


def refuse_non_finite_weights(model: nn.Module, step: int, *, student: str = "") -> None:
    """Refuse weights that are not finite, before they are saved.

    A gradient can be NaN under a finite loss (that of a root at 0 is). The loss is NaN one step
    later, which may be one checkpoint too late.

    Raises:
        NonFiniteError: names the step and a parameter.
    """
    finite = [parameter.detach().isfinite().all() for parameter in model.parameters()]
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
        hint="Lower optimizer.lr or set clip_grad_norm.",
    )
