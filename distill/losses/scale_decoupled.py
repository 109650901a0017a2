"""Scale-decoupled distillation: one loss per cell; cells that contradict the image weigh more.

Shape letters: B batch, R cells (cell 0 is the whole image), C classes.

The logits of a cell are the head applied to the mean of the feature map over that cell. `labels_B`
is the target class; for mixed views pass `majority_labels`. The label loss that goes with all three
forms takes the student's ordinary logits and is not included.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.decoupled import SoftClasses, dkd_rows, nkd_rows
from distill.losses.kd import kd_rows, standardize_logits
from distill.losses.logspace import widen


def sdd_weights(
    teacher_logits_BRC: Tensor,
    labels_B: Tensor,
    *,
    complementary_weight: float = 2.0,
    report: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the weight of each cell, [B, R], in float32 or wider; cell 0 always has 1.

    A cell is complementary where exactly one of the teacher's two predictions, for the cell and
    for the whole image, is the label. All other cells are consistent and have weight 1.
    Predictions are the argmax of logits, so no temperature enters.

    `report` gets the fraction of complementary cells as `complementary`, and the total weight of
    either kind divided by the number of all cells as `weight_consistent` and
    `weight_complementary`.

    Source: Wei et al., "Scale Decoupled Distillation", CVPR 2024. Its beta is a literal 2 in the
    published code.
    """
    right_BR = teacher_logits_BRC.detach().argmax(dim=-1) == labels_B.unsqueeze(-1)
    complementary_BR = (right_BR != right_BR[:, :1]).to(widen(teacher_logits_BRC).dtype)
    if report is not None:
        fraction = complementary_BR.mean()
        report.update(
            complementary=fraction,
            weight_consistent=1.0 - fraction,
            weight_complementary=complementary_weight * fraction,
        )
    return 1.0 + (complementary_weight - 1.0) * complementary_BR


def sdd_kd_loss(
    student_logits_BRC: Tensor,
    teacher_logits_BRC: Tensor,
    labels_B: Tensor,
    *,
    temperature: float = 4.0,
    complementary_weight: float = 2.0,
    standardize: bool = False,
    report: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the mean over cells and batch of w T**2 KL(teacher || student), in nats.

    w is 1 or the complementary weight; 1 switches the decoupling off. `standardize` compares the
    z-scores of each cell's logits, under the weights of raw logits. `report`: see `sdd_weights`.

    Source: Wei et al. 2024, SD-KD of the published code: weights 0.1 for the label loss and 0.9
    for this, no warm-up. The sum is divided by R * B, not by the sum of the weights, as there.
    Departure: that code zeroes NaN elements and a non-finite loss; here they stay, and the
    trainer stops on them.
    """
    weights_BR = sdd_weights(
        teacher_logits_BRC, labels_B, complementary_weight=complementary_weight, report=report
    )
    if standardize:
        student_logits_BRC = standardize_logits(student_logits_BRC)
        teacher_logits_BRC = standardize_logits(teacher_logits_BRC)
    rows_BR = kd_rows(student_logits_BRC, teacher_logits_BRC, temperature=temperature)
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
    standardize: bool = False,
    report: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the mean over cells and batch of w (alpha TCKD + beta NCKD), in nats.

    Arguments as in `sdd_kd_loss` and `dkd_loss`; the label is the target class of every cell.

    Source: Wei et al. 2024, SD-DKD of the published code: label loss of weight 1, this one warmed
    up over 20 epochs (ImageNet 1); ImageNet at T = 1 with beta 0.5 or 2. Departures: those of
    `dkd_loss`, and a non-finite loss is not replaced by zero.
    """
    weights_BR = sdd_weights(
        teacher_logits_BRC, labels_B, complementary_weight=complementary_weight, report=report
    )
    if standardize:
        student_logits_BRC = standardize_logits(student_logits_BRC)
        teacher_logits_BRC = standardize_logits(teacher_logits_BRC)
    rows_BR = dkd_rows(
        student_logits_BRC,
        teacher_logits_BRC,
        labels_B.unsqueeze(-1),
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        report=report,
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
    teacher_at_1_BRC: Tensor | None = None,
    report: dict[str, Tensor] | None = None,
) -> Tensor:
    """Return the mean over cells and batch of w times the NKD of each cell, in nats.

    Arguments as in `sdd_kd_loss` and `nkd_loss`; the label is the target class of every cell.

    Source: Wei et al. 2024, SD-NKD of the published code, which reads T = 4 and gamma = 8 or 6
    from the DKD settings while plain NKD has 1 and 1.5: the two columns of its tables differ in
    more than the cells. Label loss of weight 1, this one warmed up over 20 epochs. Departures:
    that code's mask hides nothing, so its figures are those of `classes="all"` (see `nkd_loss`);
    the default is the formula as the NKD paper has it. A non-finite loss is not replaced by zero.
    """
    weights_BR = sdd_weights(
        teacher_logits_BRC, labels_B, complementary_weight=complementary_weight, report=report
    )
    rows_BR = nkd_rows(
        student_logits_BRC,
        teacher_logits_BRC,
        labels_B.unsqueeze(-1),
        temperature=temperature,
        gamma=gamma,
        classes=classes,
        teacher_at_1_XC=teacher_at_1_BRC,
    )
    return (weights_BR * rows_BR).mean()
