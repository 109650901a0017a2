"""How far a run is, and how well it did on the way: the small part of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from distill.scores import Evaluation
from distill.totals import EpochTotals


@dataclass
class History:
    """Where a run stands.

    Attributes:
        step: batches trained on.
        totals: of the epoch under way.
        last: scores after the last scored epoch.
        best: the best top-1 of any epoch. Chosen on the evaluation set, so it flatters.
        best_epoch: epochs completed when it was reached.
    """

    step: int = 0
    totals: EpochTotals = field(default_factory=EpochTotals)
    last: Evaluation | None = None
    best: Evaluation | None = None
    best_epoch: int | None = None

    def note(self, evaluation: Evaluation, epoch: int) -> None:
        """Take in the scores after so many epochs."""
        self.last = evaluation
        if self.best is None or evaluation.top1 > self.best.top1:
            self.best, self.best_epoch = evaluation, epoch

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "step": self.step,
            "totals": self.totals.state(),
            "last": None if self.last is None else self.last._asdict(),
            "best": None if self.best is None else self.best._asdict(),
            "best_epoch": self.best_epoch,
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from a checkpoint."""
        self.step = state["step"]
        self.totals.restore(state["totals"], device)
        self.last = None if state["last"] is None else Evaluation(**state["last"])
        self.best = None if state["best"] is None else Evaluation(**state["best"])
        self.best_epoch = state["best_epoch"]
