"""Distillation without a better teacher: second views, same-class pairs, past predictions, Tf-KD.

Shape letters: B batch, C classes, D channels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from distill.losses.kd import kd_loss
from distill.losses.labels import soft_cross_entropy
from distill.losses.logspace import kl_rows, log_probabilities, widen


class SelfView(NamedTuple):
    """The network's output for one view of each sample; row i of both views is one sample.

    Features are the pooled input of the classifier, and targets those of `label_targets`; the two
    views may be mixed differently.
    """

    logits_BC: Tensor
    features_BD: Tensor
    targets_BC: Tensor


class DdgsdTerms(NamedTuple):
    """The five terms of DDGSD, () tensors in nats (`mmd`: squared feature units)."""

    label_a: Tensor
    label_b: Tensor
    kl_ab: Tensor
    kl_ba: Tensor
    mmd: Tensor

    def weighted(self, *, kl_weight: float, mmd_weight: float) -> DdgsdTerms:
        """Return the terms as they are added up in `ddgsd_loss`."""
        kl_ab, kl_ba = kl_weight * self.kl_ab, kl_weight * self.kl_ba
        return self._replace(kl_ab=kl_ab, kl_ba=kl_ba, mmd=mmd_weight * self.mmd)


def mmd_loss(features_a_BD: Tensor, features_b_BD: Tensor) -> Tensor:
    """Return the squared distance of the two batch means, summed over D."""
    gap_BD = widen(features_a_BD) - widen(features_b_BD)
    return gap_BD.mean(dim=0).square().sum()


def ddgsd_terms(
    a: SelfView, b: SelfView, *, temperature: float = 1.0, detach_targets: bool = False
) -> DdgsdTerms:
    """Return the label losses of both views, KL(a || b), KL(b || a) and the MMD of features.

    Both KL terms carry T**2. `detach_targets` takes the first side of each KL as a constant;
    otherwise gradients flow both ways, as in the paper.

    Source: Xu & Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI
    2019, at T = 1. The authors published no code. Departures of two other implementations:
    ddgsd-pytorch has T = 3 without T**2, divides the KL by C and compares the views' logits
    instead of feature means; Self-KD-Lib has T = 4, detaches the targets, takes a quarter of the
    label losses (their mean over both views, halved) and compares the two means over all samples
    and channels.
    """
    log_a_BC = log_probabilities(a.logits_BC, temperature=temperature)
    log_b_BC = log_probabilities(b.logits_BC, temperature=temperature)
    target_a_BC = log_a_BC.detach() if detach_targets else log_a_BC
    target_b_BC = log_b_BC.detach() if detach_targets else log_b_BC
    return DdgsdTerms(
        label_a=soft_cross_entropy(a.logits_BC, a.targets_BC),
        label_b=soft_cross_entropy(b.logits_BC, b.targets_BC),
        kl_ab=temperature**2 * kl_rows(target_a_BC, log_b_BC).mean(),
        kl_ba=temperature**2 * kl_rows(target_b_BC, log_a_BC).mean(),
        mmd=mmd_loss(a.features_BD, b.features_BD),
    )


def ddgsd_loss(terms: DdgsdTerms, *, kl_weight: float = 1.0, mmd_weight: float = 5e-4) -> Tensor:
    """Return `label_a + label_b + kl_weight (kl_ab + kl_ba) + mmd_weight mmd`.

    Source: as `ddgsd_terms`; lambda = 1, mu = 1e-4 to 5e-4.
    """
    return torch.stack(terms.weighted(kl_weight=kl_weight, mmd_weight=mmd_weight)).sum()


def cskd_loss(logits_BC: Tensor, pair_logits_BC: Tensor, *, temperature: float = 4.0) -> Tensor:
    """Return T**2 KL(pair || sample) at T, in nats, averaged over the batch.

    Row i of `pair_logits_BC` is another sample of the class of row i, through the same network.
    They are constants: no gradient reaches them.

    Source: Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation",
    CVPR 2020, and its code: T = 4, weight 1, label loss of weight 1 on `logits_BC` only, so half
    of the images in a batch of pairs get no label loss. Departure: the code draws the second
    sample from all n of the class, so it is the same sample in 1 of n pairs.
    """
    return kd_loss(logits_BC, pair_logits_BC, temperature=temperature)


def pskd_alpha(epoch: float, *, epochs: int, final: float = 0.8) -> float:
    """Return the weight of the past predictions: `final * t / epochs`, one value per epoch.

    `epoch` is fractional and 0.0 at the start; t = floor(epoch) + 1, at most `epochs`.

    Source: Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
    2021, and its code.
    """
    return final * min(math.floor(epoch) + 1, epochs) / epochs


def soften_targets(
    targets_BC: Tensor,
    previous_logits_BC: Tensor,
    *,
    alpha: float,
    known_B: Tensor | None = None,
) -> Tensor:
    """Return `(1 - alpha) targets + alpha softmax(previous)`, [B, C]; rows sum to 1.

    Targets are those of `label_targets`, and previous logits this student's, of the same samples
    an epoch ago. Where the bool `known_B` is False there is no previous prediction, and the target
    stays as it is, whatever finite logits are given.
    """
    previous_BC = log_probabilities(previous_logits_BC.detach()).exp()
    softened_BC = (1.0 - alpha) * targets_BC + alpha * previous_BC
    if known_B is None:
        return softened_BC
    return torch.where(known_B.unsqueeze(-1), softened_BC, targets_BC)


def pskd_loss(
    logits_BC: Tensor,
    targets_BC: Tensor,
    previous_logits_BC: Tensor,
    *,
    alpha: float,
    known_B: Tensor | None = None,
) -> Tensor:
    """Return the cross-entropy against the softened labels, in nats, averaged over the batch.

    Arguments as in `soften_targets`. T = 1 throughout, and no other label loss is added.

    Source: Kim et al. 2021; their code starts from the labels themselves as previous predictions,
    which is alpha = 0 in the first epoch.
    """
    softened_BC = soften_targets(targets_BC, previous_logits_BC, alpha=alpha, known_B=known_B)
    return soft_cross_entropy(logits_BC, softened_BC)


def virtual_teacher(
    labels_B: Tensor,
    *,
    num_classes: int,
    correct: float = 0.99,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return probability `correct` for the label and the rest spread evenly, [B, C].

    `correct` is at least 0.9 in the paper and 0.99 in its code.
    """
    others = (1.0 - correct) / (num_classes - 1)
    return others + (correct - others) * one_hot(labels_B, num_classes).to(dtype)


def virtual_teacher_loss(
    logits_BC: Tensor, labels_B: Tensor, *, correct: float = 0.99, temperature: float = 20.0
) -> Tensor:
    """Return KL(softmax(u / T) || softmax(z)), u the virtual teacher, in nats, batch mean.

    T is the teacher's only. For mixed views pass `majority_labels`. The other form of the paper,
    Tf-KD self, is `kd_loss` from a cache of the student's own checkpoint.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization",
    CVPR 2020, Tf-KD reg. The paper softens both sides; the code, followed here, takes the
    *probabilities* u as logits, divides only them by T, and has no T**2. Its weight: 0.9 CE + 0.1
    of this at T = 20 for ResNet-18 on CIFAR-100. It averages over classes and multiplies by 100
    there, which cancels at C = 100; elsewhere its weight is multiplier / C of this one's.
    """
    teacher_BC = virtual_teacher(
        labels_B, num_classes=logits_BC.shape[-1], correct=correct, dtype=widen(logits_BC).dtype
    )
    softened_BC = log_probabilities(teacher_BC, temperature=temperature)
    return kl_rows(softened_BC, log_probabilities(logits_BC)).mean()
