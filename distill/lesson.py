"""A batch as students are taught it: moved to their device once, each answer decoded once.

Shape letters: B batch, R cells, C classes, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distill.batches import Batch
from distill.finite import FiniteWatch
from distill.stream import Stream


class Run(NamedTuple):
    """What all students share, from the first step to the last.

    Attributes:
        stream: batches, and what teachers say about them.
        device: where the students are.
        watch: over every loss.
    """

    stream: Stream
    device: torch.device
    watch: FiniteWatch


class Lesson:
    """One batch for any number of students.

    Attributes:
        batch: on the device.
        samples_B: its samples, where they were read.
    """

    def __init__(self, run: Run, batch: Batch) -> None:
        self.batch = batch.to(str(run.device))
        self.samples_B = batch.samples_B
        self._run = run
        self._answers: dict[tuple[int, int, float], Tensor] = {}

    @torch.no_grad()
    def teach(
        self, *, temperature: float = 1.0, cache: int = 0, views: Batch | None = None
    ) -> Tensor:
        """A teacher's logits, float32 [B, R, C]; the same tensor for whoever asks again.

        `views` is a part of `batch`, such as `batch.again`; by default all of it.
        """
        batch = self.batch if views is None else views
        asked = (id(batch), cache, temperature)
        if asked not in self._answers:
            # Outside of autocast: derived cells are sums over stored ones; bfloat16 rounds them.
            with torch.autocast(self._run.device.type, enabled=False):
                self._answers[asked] = self._run.stream.teach(
                    batch, temperature=temperature, cache=cache
                )
        return self._answers[asked]
