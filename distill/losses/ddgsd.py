"""Data-distortion guided self-distillation: two views of a sample teach each other.

Shape letters: B batch, C classes, D channels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from distill.losses.logspace import kl_rows, log_probabilities, widen
from distill.losses.soft_targets import soft_cross_entropy


class SelfView(NamedTuple):
    """What one network says about one view of each sample; row i of both views is one sample."""

    logits_BC: Tensor
    """Raw logits."""
    features_BD: Tensor
    """Global features: the pooled input of the classifier."""
    targets_BC: Tensor
    """Class distributions of this view, from `label_targets`; the two views may be mixed apart."""


class DdgsdTerms(NamedTuple):
    """The five terms, () tensors in nats (`mmd`: squared feature units), unweighted."""

    label_a: Tensor
    label_b: Tensor
    kl_ab: Tensor
    kl_ba: Tensor
    mmd: Tensor


def mmd_loss(features_a_BD: Tensor, features_b_BD: Tensor) -> Tensor:
    """Return the squared distance of the two batch means, summed over D."""
    gap_BD = widen(features_a_BD) - widen(features_b_BD)
    return gap_BD.mean(dim=0).square().sum()


def ddgsd_terms(
    a: SelfView, b: SelfView, *, temperature: float = 1.0, detach_targets: bool = False
) -> DdgsdTerms:
    """Return the label losses of both views, KL(a || b), KL(b || a) and the MMD of features.

    Args:
        a: one view of each sample.
        b: another view of the same samples, in the same order, through the same network.
        temperature: T > 0 of both KL terms, which carry T**2.
        detach_targets: take the first side of each KL as a constant. Otherwise gradients flow
            both ways, as in the paper.

    Source: Xu & Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI
    2019, at T = 1. There is no code of theirs. Two others' departures: ddgsd-pytorch has T = 3
    without T**2, divides the KL by C and compares the views' logits instead of feature means;
    Self-KD-Lib has T = 4, detaches the targets, halves the label losses and compares the two
    means over all samples and channels.
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
    labels = terms.label_a + terms.label_b
    return labels + kl_weight * (terms.kl_ab + terms.kl_ba) + mmd_weight * terms.mmd
