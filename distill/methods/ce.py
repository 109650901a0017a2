"""`ce`: labels alone, the baseline of every comparison. Teachers, if there are any, stay unread."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from distill.methods.method import Method, MethodSettings, Step, label_term


class CE(MethodSettings):
    """Cross-entropy on the label."""

    name: Literal["ce"] = "ce"


def ce(_settings: CE, step: Step) -> dict[str, Tensor]:
    """The label loss on the same views that other methods see."""
    return {"label": label_term(step, step.student(step.images_B3HW))}


METHOD = Method(CE, ce)
