"""Scale-decoupled distillation: one row loss per cell, cells that contradict the image count more.

Shape letters: B batch, R cells (cell 0 is the whole image), C classes.

Logits of a cell come from the head applied to the mean of the feature map over that cell.
`labels_B` is the target class; for mixed views pass `majority_labels`. The label loss, which goes
with all three forms, always takes the student's ordinary logits.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.dkd import dkd_rows
from distill.losses.logspace import widen
from distill.losses.nkd import SoftClasses, nkd_rows
from distill.losses.soft_targets import kd_rows


def sdd_weights(
    teacher_logits_BRC: Tensor, labels_B: Tensor, *, complementary_weight: float = 2.0
) -> Tensor:
    """Return the weight of each cell, [B, R], in float32 or wider; cell 0 always has 1.

    A cell is complementary where exactly one of the teacher's two verdicts, on the cell and on
    the whole image, names the label: it knows what the image hides, or doubts what it claims.
    All others are consistent and have weight 1.

    Source: Wei et al., "Scale Decoupled Distillation", CVPR 2024. Its beta is a literal 2 in the
    published code. Verdicts are argmax of the teacher's logits, so no temperature enters.
    """
    right_BR = teacher_logits_BRC.detach().argmax(dim=-1) == labels_B.unsqueeze(-1)
    complementary_BR = right_BR != right_BR[:, :1]
    return 1.0 + (complementary_weight - 1.0) * complementary_BR.to(widen(teacher_logits_BRC).dtype)


def sdd_kd_loss(
    student_logits_BRC: Tensor,
    teacher_logits_BRC: Tensor,
    labels_B: Tensor,
    *,
    temperature: float = 4.0,
    complementary_weight: float = 2.0,
) -> Tensor:
    """Return the mean over cells and batch of w T**2 KL(teacher || student), in nats.

    Args:
        student_logits_BRC: raw logits of every cell.
        teacher_logits_BRC: raw logits of the same cells and views; taken as constants.
        labels_B: int64 target classes, which only decide the weights.
        temperature: T > 0.
        complementary_weight: 1 switches the decoupling off.

    Source: Wei et al. 2024, SD-KD of the published code: weights 0.1 for the label loss and 0.9
    for this, no warm-up. The sum is divided by R * B, not by the sum of the weights, as there.
    Departure: that code zeroes NaN elements and a non-finite loss; here they stay, and the
    trainer stops on them.
    """
    rows_BR = kd_rows(student_logits_BRC, teacher_logits_BRC, temperature=temperature)
    weights_BR = sdd_weights(
        teacher_logits_BRC, labels_B, complementary_weight=complementary_weight
    )
    return (weights_BR * rows_BR).mean()


def sdd_dkd_loss(
    student_logits_BRC: Tensor,
    teacher_logits_BRC: Tensor,
    labels_B: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    complementary_weight: float = 2.0,
) -> Tensor:
    """Return the mean over cells and batch of w (alpha TCKD + beta NCKD), in nats.

    Arguments as in `sdd_kd_loss` and `dkd_loss`; the labels are every cell's target class too.

    Source: Wei et al. 2024, SD-DKD of the published code: label loss of weight 1, this one warmed
    up over 20 epochs (ImageNet 1); ImageNet at T = 1 with beta 0.5 or 2. Departures: those of
    `dkd_loss`, and a non-finite loss is not replaced by zero.
    """
    rows_BR = dkd_rows(
        student_logits_BRC,
        teacher_logits_BRC,
        labels_B.unsqueeze(-1),
        temperature=temperature,
        alpha=alpha,
        beta=beta,
    )
    weights_BR = sdd_weights(
        teacher_logits_BRC, labels_B, complementary_weight=complementary_weight
    )
    return (weights_BR * rows_BR).mean()


def sdd_nkd_loss(
    student_logits_BRC: Tensor,
    teacher_logits_BRC: Tensor,
    labels_B: Tensor,
    *,
    temperature: float = 4.0,
    gamma: float = 8.0,
    classes: SoftClasses = "others",
    complementary_weight: float = 2.0,
) -> Tensor:
    """Return the mean over cells and batch of w times the NKD of each cell, in nats.

    Arguments as in `sdd_kd_loss` and `nkd_loss`; the labels are every cell's target class too.

    Source: Wei et al. 2024, SD-NKD of the published code, which reads T = 4 and gamma = 8 or 6
    from the DKD settings while plain NKD has 1 and 1.5: the two columns of its tables differ in
    more than the cells. Label loss of weight 1, this one warmed up over 20 epochs. Departures:
    that code's mask hides nothing, so its figures are those of `classes="all"` (see `nkd_loss`);
    the default is the formula as the NKD paper has it. A non-finite loss is not replaced by zero.
    """
    rows_BR = nkd_rows(
        student_logits_BRC,
        teacher_logits_BRC,
        labels_B.unsqueeze(-1),
        temperature=temperature,
        gamma=gamma,
        classes=classes,
    )
    weights_BR = sdd_weights(
        teacher_logits_BRC, labels_B, complementary_weight=complementary_weight
    )
    return (weights_BR * rows_BR).mean()
