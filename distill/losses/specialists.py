"""A generalist and its specialists: training a specialist, and combining all at inference.

Shape letters: B batch, C classes, M specialists, S outputs of one specialist: the classes of its
subset in the subset's order, then one dustbin class that stands for all the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distill.losses.kd import kd_loss
from distill.losses.labels import label_loss
from distill.losses.logspace import scale_logits


def _is_member(subset: Tensor, num_classes: int) -> Tensor:
    """Return whether each class is in the subset, bool [C]."""
    classes_C = torch.arange(num_classes, device=subset.device)
    return torch.isin(classes_C, subset)


def dustbin_logits(logits_BC: Tensor, subset: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Fold all classes outside a subset into one, [B, S].

    Softmax of the result at this same T has the members' probabilities unchanged and in the last
    place the sum of all others'. -inf there if the subset leaves no class out.

    `subset` holds distinct int64 classes.
    """
    scaled_BC = scale_logits(logits_BC, temperature=temperature)
    outside_BC = scaled_BC.masked_fill(_is_member(subset, logits_BC.shape[-1]), -torch.inf)
    dustbin_B1 = outside_BC.logsumexp(dim=-1, keepdim=True)
    return temperature * torch.cat([scaled_BC[:, subset], dustbin_B1], dim=-1)


def dustbin_labels(labels_B: Tensor, subset: Tensor) -> Tensor:
    """Return each label's place among the specialist's outputs, int64 [B]; last = outside."""
    hit_BS = labels_B.unsqueeze(-1) == subset
    return torch.where(hit_BS.any(dim=-1), hit_BS.int().argmax(dim=-1), len(subset))


def specialist_terms(
    specialist_logits_BS: Tensor,
    specialist_at_T_BS: Tensor,
    generalist_logits_BC: Tensor,
    labels_B: Tensor,
    subset: Tensor,
    *,
    temperature: float,
    alpha: float,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the weighted label and soft terms of `specialist_loss`, with label smoothing.

    A network with outputs for all C classes has `dustbin_logits` at 1 for the label term and at T
    for the soft term, which then is 0 for the generalist's own logits.
    """
    folded_BS = dustbin_logits(generalist_logits_BC, subset, temperature=temperature)
    labels_in_S = dustbin_labels(labels_B, subset)
    label = label_loss(specialist_logits_BS, labels_in_S, smoothing=smoothing)
    soft = kd_loss(specialist_at_T_BS, folded_BS, temperature=temperature)
    return (1.0 - alpha) * label, alpha * soft


def specialist_loss(
    specialist_logits_BS: Tensor,
    generalist_logits_BC: Tensor,
    labels_B: Tensor,
    subset: Tensor,
    *,
    temperature: float,
    alpha: float,
) -> Tensor:
    """Return `(1 - alpha) CE + alpha T**2 KL(generalist || specialist)`, in nats.

    Both terms run over the classes of the subset and the dustbin. A specialist has few samples of
    its own classes, and the generalist's soft targets keep it from overfitting them.

    The specialist's logits have the dustbin last; the generalist's and the labels are over all C
    classes.

    Source: Hinton et al. 2015, sections 5.2 and 6.1. They leave T and alpha open.
    """
    label, soft = specialist_terms(
        specialist_logits_BS,
        specialist_logits_BS,
        generalist_logits_BC,
        labels_B,
        subset,
        temperature=temperature,
        alpha=alpha,
    )
    return label + soft


def correct_dustbin(specialist_logits_BS: Tensor, *, oversampling: float) -> Tensor:
    """Return the logits with log(oversampling) added to the dustbin's, [B, S].

    Undoes training on a set where the subset's classes were `oversampling` times as frequent,
    against all others, as they really are. Source: Hinton et al. 2015, section 5.2.
    """
    dustbin_B1 = specialist_logits_BS[:, -1:] + math.log(oversampling)
    return torch.cat([specialist_logits_BS[:, :-1], dustbin_B1], dim=-1)


def active_specialists(
    generalist_p_BC: Tensor, subsets: Sequence[Tensor], *, top: int = 1
) -> Tensor:
    """Return which specialists are active for each sample, bool [B, M].

    A specialist is active where its subset holds one of the generalist's `top` likeliest classes.
    Source: Hinton et al. 2015, section 5.4, with top = 1.
    """
    likeliest = generalist_p_BC.topk(top, dim=-1).indices
    return torch.stack([torch.isin(likeliest, subset).any(dim=-1) for subset in subsets], dim=-1)


class Combination(NamedTuple):
    """Distributions q, float64 with rows that sum to 1, after `num_steps` steps.

    `gap_B` is a proven bound, in nats, of how far the objective at q is above its minimum.
    """

    q_BC: Tensor
    gap_B: Tensor
    num_steps: int


def _events(
    generalist_p_BC: Tensor,
    specialist_ps: Sequence[Tensor],
    subsets: Sequence[Tensor],
    active_BM: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mass of single classes [B, C], of dustbins [B, M], and their members [M, C].

    All in float64; specialists that are not active contribute nothing.
    """
    known_BC = generalist_p_BC.double()
    dustbins, outsides = [], []
    for m, (specialist_BS, subset) in enumerate(zip(specialist_ps, subsets, strict=True)):
        mass_BS = specialist_BS.double()
        if active_BM is not None:
            mass_BS = mass_BS * active_BM[:, m, None]
        known_BC = known_BC.index_add(-1, subset, mass_BS[:, :-1])
        dustbins.append(mass_BS[:, -1])
        outsides.append((~_is_member(subset, known_BC.shape[-1])).double())
    if not subsets:
        return known_BC, known_BC[:, :0], known_BC[:0]
    return known_BC, torch.stack(dustbins, dim=-1), torch.stack(outsides)


@torch.no_grad()
def combine_specialists(
    generalist_p_BC: Tensor,
    specialist_ps: Sequence[Tensor],
    subsets: Sequence[Tensor],
    *,
    active_BM: Tensor | None = None,
    tolerance: float = 1e-12,
    max_steps: int = 10_000,
) -> Combination:
    """Find the q that minimizes KL(p_g || q) + sum over active m of KL(p_m || q folded for m).

    Folded for m: q of the subset's classes, and the sum of q over all others as the dustbin.

    The objective is convex in q. Each step is a mirror-descent step at the step size where it
    becomes the EM update: a specialist's dustbin mass is distributed over the classes outside its
    subset in proportion to q, and all distributions are averaged. It needs no step size, never
    raises the objective and stays on the simplex. By Jensen's inequality the objective is at most
    W log max_c(step_c / q_c) above its minimum, W the number of distributions; that is the gap.

    Args:
        generalist_p_BC: probabilities of the generalist.
        specialist_ps: probabilities [B, S] of each of M >= 0 specialists, dustbin last.
        subsets: int64 classes of each; at least one class must be outside.
        active_BM: bool; None makes all of them active for every sample.
        tolerance: in nats; stop once no sample's gap is above it.
        max_steps: stop after so many; `gap_B` then bounds the remaining error.

    Source: Hinton et al. 2015, section 5.4, equation 5. There q is a softmax of free logits under
    gradient descent; the minimum is the same one.
    """
    known_BC, dustbin_BM, outside_MC = _events(generalist_p_BC, specialist_ps, subsets, active_BM)
    total_B1 = known_BC.sum(-1, keepdim=True) + dustbin_BM.sum(-1, keepdim=True)

    # A class at exactly 0 would stay there: start inside the simplex.
    q_BC = 0.5 * generalist_p_BC.double() + 0.5 / generalist_p_BC.shape[-1]
    gap_B, num_steps = torch.full_like(q_BC[:, 0], torch.inf), 0
    while num_steps < max_steps and bool((gap_B > tolerance).any()):
        ratio_BM = torch.where(dustbin_BM > 0, dustbin_BM / (q_BC @ outside_MC.T), 0.0)
        slope_BC = torch.where(known_BC > 0, known_BC / q_BC, 0.0) + ratio_BM @ outside_MC
        gap_B = total_B1[:, 0] * (slope_BC / total_B1).amax(dim=-1).log()
        q_BC = q_BC * slope_BC / total_B1
        num_steps += 1
    return Combination(q_BC, gap_B, num_steps)
