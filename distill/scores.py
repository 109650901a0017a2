"""Computes scores of a classifier from running sums on its device.

Shape letters: B batch, C classes, N bins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, nll_loss

from cache_service.errors import ConfigError

NUM_BINS = 15
"""Number of confidence bins of the calibration error, as in Guo et al. 2017."""


class Evaluation(NamedTuple):
    """Scores over a set of views.

    Attributes:
        num_samples: number of views.
        top1: fraction classified correctly. A mixed view has the label with the larger weight.
        top5: fraction whose label is among the five most likely classes.
        nll: mean negative log-likelihood of the label, nats.
        ece: expected calibration error, the mean difference of confidence and accuracy in 15 bins.
        agreement: fraction with the same predicted class as the teacher; None without a teacher.
    """

    num_samples: int
    top1: float
    top5: float
    nll: float
    ece: float
    agreement: float | None


class Tally:
    """Running sums on the device. Only `evaluation` waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._num_samples = 0
        self._has_teacher = False
        self._sums_4 = torch.zeros(4, dtype=torch.float64, device=device)
        self._top1, self._top5, self._nll, self._agreed = self._sums_4.unbind()
        self._bins_3N = torch.zeros(3, NUM_BINS, dtype=torch.float64, device=device)

    def add(self, logits_BC: Tensor, labels_B: Tensor) -> None:
        """Add a batch of float32 logits."""
        logp_BC = log_softmax(logits_BC, dim=-1)
        confidence_B, guess_B = logp_BC.exp().max(dim=-1)
        right_B = (guess_B == labels_B).double()
        likeliest_BK = logits_BC.topk(min(5, logits_BC.shape[-1]), dim=-1).indices
        self._num_samples += len(labels_B)
        self._top1 += right_B.sum()
        self._top5 += (likeliest_BK == labels_B[:, None]).any(dim=-1).sum()
        self._nll += nll_loss(logp_BC, labels_B, reduction="sum")
        # A bin excludes its lower and includes its upper edge, so a confidence of 1 is in the last.
        bin_B = (confidence_B * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
        facts_3B = torch.stack([torch.ones_like(right_B), right_B, confidence_B.double()])
        self._bins_3N.index_add_(1, bin_B, facts_3B)

    def add_agreement(self, logits_BC: Tensor, teacher_BC: Tensor) -> None:
        """Compare the predicted classes with those of a teacher on the same batch."""
        self._has_teacher = True
        self._agreed += (logits_BC.argmax(dim=-1) == teacher_BC.argmax(dim=-1)).sum()

    def add_up(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Add the sums of all other processes that evaluate parts of the same set.

        Args:
            sum_over_ranks: function that returns the sum of a float64 vector over all processes.
        """
        count = self._sums_4.new_tensor([self._num_samples])
        parts = (self._sums_4, self._bins_3N.flatten(), count)
        summed = torch.split(sum_over_ranks(torch.cat(parts)), [len(part) for part in parts])
        sums_4, bins, count = summed
        self._sums_4.copy_(sums_4)
        self._bins_3N.copy_(bins.view_as(self._bins_3N))
        self._num_samples = int(count)

    def evaluation(self) -> Evaluation:
        """Return the scores over all batches.

        Raises:
            ConfigError: no batch was added.
        """
        if not self._num_samples:
            raise ConfigError("there is nothing to evaluate on: the dataset gave no views.")
        _, right_N, confidence_N = self._bins_3N
        ece = (right_N - confidence_N).abs().sum()
        sums = torch.stack([self._top1, self._top5, self._nll, ece, self._agreed])
        top1, top5, nll, ece_mean, agreed = (sums / self._num_samples).tolist()
        return Evaluation(
            self._num_samples, top1, top5, nll, ece_mean, agreed if self._has_teacher else None
        )
