"""Distillation losses: pure functions of tensors, one file per method.

No settings object, no state, no input or output. Every loss is summed in float32 (float64 where
the logits already are), also under autocast; is in nats unless it says otherwise; comes back as a
() tensor averaged over the batch (`*_rows` as one value per view); and is finite for finite logits
at any T > 0 of use. Gradients stop at whatever teaches, but for two views that teach each other.
Nothing is replaced when it is not finite: the trainer stops on it. Which T, weights and labels make
sense is checked by the settings of each method, not here.
"""

from __future__ import annotations

from distill.losses.cskd import cskd_loss
from distill.losses.ddgsd import DdgsdTerms, SelfView, ddgsd_loss, ddgsd_terms, mmd_loss
from distill.losses.dist import dist_loss, inter_class_loss, intra_class_loss
from distill.losses.dkd import dkd_loss, dkd_rows, nckd_rows, tckd_rows
from distill.losses.ensemble import (
    ensemble_log_probabilities,
    ensemble_logits,
    multi_teacher_hard_loss,
    multi_teacher_soft_loss,
)
from distill.losses.labels import label_targets, majority_labels
from distill.losses.nkd import nkd_loss, nkd_rows
from distill.losses.peers import peer_losses, peer_match_loss
from distill.losses.pskd import pskd_alpha, pskd_loss, soften_targets
from distill.losses.sdd import sdd_dkd_loss, sdd_kd_loss, sdd_nkd_loss, sdd_weights
from distill.losses.soft_targets import (
    kd_loss,
    kd_rows,
    label_loss,
    logit_matching_loss,
    soft_cross_entropy,
)
from distill.losses.specialists import (
    Combination,
    active_specialists,
    combine_specialists,
    correct_dustbin,
    dustbin_labels,
    dustbin_logits,
    specialist_loss,
)
from distill.losses.standardize import standardize_logits
from distill.losses.tfkd import virtual_teacher, virtual_teacher_loss

__all__ = [
    "Combination",
    "DdgsdTerms",
    "SelfView",
    "active_specialists",
    "combine_specialists",
    "correct_dustbin",
    "cskd_loss",
    "ddgsd_loss",
    "ddgsd_terms",
    "dist_loss",
    "dkd_loss",
    "dkd_rows",
    "dustbin_labels",
    "dustbin_logits",
    "ensemble_log_probabilities",
    "ensemble_logits",
    "inter_class_loss",
    "intra_class_loss",
    "kd_loss",
    "kd_rows",
    "label_loss",
    "label_targets",
    "logit_matching_loss",
    "majority_labels",
    "mmd_loss",
    "multi_teacher_hard_loss",
    "multi_teacher_soft_loss",
    "nckd_rows",
    "nkd_loss",
    "nkd_rows",
    "peer_losses",
    "peer_match_loss",
    "pskd_alpha",
    "pskd_loss",
    "sdd_dkd_loss",
    "sdd_kd_loss",
    "sdd_nkd_loss",
    "sdd_weights",
    "soft_cross_entropy",
    "soften_targets",
    "specialist_loss",
    "standardize_logits",
    "tckd_rows",
    "virtual_teacher",
    "virtual_teacher_loss",
]
