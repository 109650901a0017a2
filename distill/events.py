"""What a run tells: one shape for files, progress bars and callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

Value = float | int | str | None


EventKind = Literal["start", "step", "evaluation", "epoch", "checkpoint", "end"]


class Event(NamedTuple):
    """Something that happened.

    Attributes:
        kind: `start` of the run, a `step` (an update that is reported), an `evaluation`, an
            `epoch` that is complete, a `checkpoint` written, the `end`.
        epoch: epochs completed before it, or for `epoch` and `evaluation` with it.
        step: batches trained on so far.
        values: by name; seconds end in `_s`, bytes in `_bytes`, losses start with `loss`.
        student: whose it is; empty where there is only one.
    """

    kind: EventKind
    epoch: int
    step: int
    values: dict[str, Value]
    student: str = ""

    def document(self) -> dict[str, Value]:
        """The event as one flat JSON object."""
        told: dict[str, Value] = {"kind": self.kind, "epoch": self.epoch, "step": self.step}
        return told | ({"student": self.student} if self.student else {}) | self.values


Listener = Callable[[Event], None]
