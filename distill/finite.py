"""A loss that is no number stops the run, and says where."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cache_service.errors import NonFiniteError
from distill.batches import Cursor
from distill.totals import Named

MAX_PENDING = 64
"""Losses left on a GPU before somebody looks: looking at each would stall it every step."""

MAX_NAMED = 16
"""Samples named in a message."""


class _Seen(NamedTuple):
    student: str
    cursor: Cursor
    samples_B: Tensor
    values: Named


class FiniteWatch:
    """Holds every loss against infinity and NaN.

    On a CPU each loss is looked at before it is used. On a GPU the answers are collected and
    looked at together, at the latest before anything is reported or kept: the model in memory may
    then be spoiled, but no file ever is, and the message names the first bad step all the same.
    """

    def __init__(self, device: torch.device) -> None:
        self._waits = device.type != "cpu"
        self._pending: list[_Seen] = []

    def see(self, cursor: Cursor, samples_B: Tensor, values: Named, *, student: str = "") -> None:
        """Take note of a batch's losses.

        Args:
            cursor: where the batch is in the run.
            samples_B: its samples; best still on the CPU.
            values: losses, and whatever else must be finite.
            student: whose; empty where there is only one.

        Raises:
            NonFiniteError: one of them, or of those seen before, is NaN or infinite.
        """
        self._pending.append(_Seen(student, cursor, samples_B, values))
        if not self._waits or len(self._pending) >= MAX_PENDING:
            self.settle()

    def settle(self) -> None:
        """Look at everything noted so far.

        Raises:
            NonFiniteError: names the first bad step, its samples and its terms.
        """
        pending, self._pending = self._pending, []
        if not pending:
            return
        # In one vector, because students may report different values: one wait for all.
        row = iter(torch.cat([seen.values.values_V for seen in pending]).tolist())
        for seen in pending:
            values = dict(zip(seen.values.names, row, strict=False))
            if not all(map(math.isfinite, values.values())):
                raise _refusal(seen, values)


def refuse_spoiled(model: nn.Module, step: int, *, student: str = "") -> None:
    """Refuse weights that are not finite, before they are kept.

    A gradient can be NaN under a loss that is not (the root of 0 has such a one); the loss shows it
    one step later, which may be one checkpoint too late.

    Raises:
        NonFiniteError: names the step and a parameter.
    """
    finite = [parameter.detach().isfinite().all() for parameter in model.parameters()]
    if bool(torch.stack(finite).all()):
        return
    name = next(name for name, p in model.named_parameters() if not bool(p.isfinite().all()))
    raise NonFiniteError(
        f"the weights of {_who(student)} are not finite after step {step} (first in {name}), "
        "although every loss was: a gradient was not.",
        hint="Lower optimizer.lr or set clip_grad_norm, then run the same command: it resumes "
        "from the last checkpoint.",
    )


def _who(student: str) -> str:
    return f"student {student}" if student else "the student"


def _refusal(seen: _Seen, values: dict[str, float]) -> NonFiniteError:
    cursor, whose = seen.cursor, f"student {seen.student} at " if seen.student else ""
    told = {
        name: value for name, value in values.items() if "loss" in name or not math.isfinite(value)
    }
    terms = ", ".join(f"{name}={value:g}" for name, value in told.items())
    samples = seen.samples_B.tolist()
    named = ", ".join(str(sample) for sample in samples[:MAX_NAMED])
    more = f" and {len(samples) - MAX_NAMED} more" if len(samples) > MAX_NAMED else ""
    return NonFiniteError(
        f"the loss of {whose}step {cursor.step} is not finite ({terms}); epoch {cursor.epoch}, "
        f"seed {cursor.seed}, positions [{cursor.start}, {cursor.stop}), samples {named}{more}. "
        "The last checkpoint is from before.",
        hint="Lower optimizer.lr or set clip_grad_norm.",
    )
