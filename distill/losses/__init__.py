"""Distillation losses: pure functions of tensors, by family.

Logits are raw, of any float type; those of student and teacher are of the same views; temperatures
T are positive, and labels int64. Every loss is summed in float32 (float64 where the logits already
are), also under autocast; is in nats unless it says otherwise; is returned as a () tensor averaged
over the batch (`*_rows` as one value per view); and is finite for finite logits. Gradients stop at
whatever teaches, except for two views that teach each other. A non-finite value is never replaced:
the trainer stops on it. Which T, weights and labels make sense is checked by the settings of each
method, not here. A dict given as `report` gets detached () tensors that are worth logging.
"""

from __future__ import annotations

from distill.losses.decoupled import (
    SoftClasses,
    dkd_loss,
    dkd_rows,
    nckd_rows,
    nkd_loss,
    nkd_rows,
    tckd_rows,
)
from distill.losses.dist import (
    dist_loss,
    dist_terms,
    inter_class_loss,
    intra_class_loss,
)
from distill.losses.kd import Direction, kd_loss, kd_rows, logit_matching_loss, standardize_logits
from distill.losses.labels import label_loss, label_targets, majority_labels, soft_cross_entropy
from distill.losses.multi_teacher import (
    EnsembleMean,
    ensemble_log_probabilities,
    ensemble_logits,
    multi_teacher_hard_loss,
    multi_teacher_soft_loss,
)
from distill.losses.peers import peer_losses, peer_match_loss
from distill.losses.scale_decoupled import sdd_dkd_loss, sdd_kd_loss, sdd_nkd_loss, sdd_weights
from distill.losses.self_distillation import (
    DdgsdTerms,
    SelfView,
    cskd_loss,
    ddgsd_loss,
    ddgsd_terms,
    mmd_loss,
    pskd_alpha,
    pskd_loss,
    soften_targets,
    virtual_teacher,
    virtual_teacher_loss,
)
from distill.losses.specialists import (
    Combination,
    active_specialists,
    combine_specialists,
    correct_dustbin,
    dustbin_labels,
    dustbin_logits,
    specialist_loss,
    specialist_terms,
)

# fmt: off
__all__ = [
    "Combination", "DdgsdTerms", "Direction", "EnsembleMean", "SelfView", "SoftClasses",
    "active_specialists", "combine_specialists", "correct_dustbin", "cskd_loss", "ddgsd_loss",
    "ddgsd_terms", "dist_loss", "dist_terms", "dkd_loss", "dkd_rows", "dustbin_labels",
    "dustbin_logits", "ensemble_log_probabilities", "ensemble_logits", "inter_class_loss",
    "intra_class_loss", "kd_loss", "kd_rows", "label_loss", "label_targets",
    "logit_matching_loss", "majority_labels", "mmd_loss", "multi_teacher_hard_loss",
    "multi_teacher_soft_loss", "nckd_rows", "nkd_loss", "nkd_rows", "peer_losses",
    "peer_match_loss", "pskd_alpha", "pskd_loss", "sdd_dkd_loss", "sdd_kd_loss", "sdd_nkd_loss",
    "sdd_weights", "soft_cross_entropy", "soften_targets", "specialist_loss",
    "specialist_terms", "standardize_logits", "tckd_rows", "virtual_teacher",
    "virtual_teacher_loss",
]
# fmt: on
