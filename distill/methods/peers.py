"""`peers`: students of one run that learn from each other while they train."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from distill.losses import kd_loss, peer_match_loss
from distill.methods.checks import needs_one_teacher
from distill.methods.method import Method, MethodSettings, RunFacts, Step, label_term
from distill.methods.requirements import Requirements
from distill.methods.setting_types import Temperature, Weight


class Peers(MethodSettings):
    """Label loss + weight T**2 mean over the peers of KL(peer || student) at T."""

    name: Literal["peers"] = "peers"
    temperature: Temperature = 1.0
    weight: Weight = 1.0
    teacher_weight: Annotated[
        Weight, Field(description="Of soft targets from the cache beside it; 0 reads none.")
    ] = 0.0


def peers(settings: Peers, step: Step) -> dict[str, Tensor]:
    """`CE + weight / (k - 1) sum_{j != i} T**2 KL(p(z_j; T) || p(z_i; T))` of student i of k.

    Its peers are the other `students` of the train file with this method; each has settings of its
    own. A single one has no peers, and learns as with `ce`. `teacher_weight` adds `kd` from one
    cache: `+ teacher_weight T**2 KL(p(v; T) || p(z_i; T))`.

    Source: Zhang et al., "Deep Mutual Learning", CVPR 2018; T = 1, weight 1. Departures: those of
    `peer_losses`; theirs has no teacher.
    """
    assert step.peers is not None
    own_BC, temperature = step.peers.own_BC, settings.temperature
    matched = peer_match_loss(own_BC, step.peers.others, temperature=temperature)
    soft = torch.zeros_like(matched)
    if settings.teacher_weight:
        teacher_BC = step.teacher_logits(temperature=temperature)[:, 0]
        soft = kd_loss(own_BC, teacher_BC, temperature=temperature)
    return {
        "label": label_term(step, own_BC),
        "peers": settings.weight * matched,
        "soft": settings.teacher_weight * soft,
    }


def _check(settings: Peers, facts: RunFacts) -> None:
    """One teacher where it has a weight; otherwise none is read, whatever `caches` names."""
    if settings.teacher_weight:
        needs_one_teacher(settings, facts)


METHODS = (Method(Peers, peers, (_check,), lambda _: Requirements(peers=True)),)
