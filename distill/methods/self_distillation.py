"""No better teacher: `tf-kd`, `ddgsd`, `ps-kd` and `cs-kd`.

Shape letters: B batch, C classes, D channels.
"""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from cache_service.errors import UnsupportedError
from cache_service.models.answers import describe
from distill.losses import (
    SelfView,
    cskd_loss,
    ddgsd_terms,
    kd_loss,
    label_targets,
    majority_labels,
    pskd_alpha,
    pskd_loss,
    virtual_teacher_loss,
)
from distill.methods.checks import needs_one_teacher, needs_unmixed
from distill.methods.method import (
    Method,
    MethodSettings,
    RunFacts,
    Step,
    label_and_soft,
    label_term,
    report_top1,
)
from distill.methods.published import published_of
from distill.methods.requirements import Requirements, SameClassPair, SecondView
from distill.methods.setting_types import Fraction, Temperature, Weight

TF_KD = {row.method["form"]: {"correct": None, **row.method} for row in published_of("tf-kd")}
"""Published settings of Tf-KD by form."""


class TfKD(MethodSettings):
    """(1 - alpha) label loss + alpha x a teacher that needs no better network."""

    name: Literal["tf-kd"] = "tf-kd"
    form: Annotated[
        Literal["virtual", "self"],
        Field(description="self: the cache of a network like the student, trained before."),
    ] = "virtual"
    temperature: Temperature = 20.0
    alpha: Fraction = 0.1
    correct: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Virtual teacher's probability of the label."),
    ] = 0.99

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, written: Any) -> Any:
        """Defaults are the published settings of the form."""
        if not isinstance(written, dict):
            return written
        return TF_KD.get(str(written.get("form", "virtual")), {}) | written

    @model_validator(mode="after")
    def _check(self) -> TfKD:
        if (self.form == "virtual") != (self.correct is not None):
            raise ValueError(
                f"correct={self.correct} with form={self.form}: the virtual teacher has such a "
                "probability, and only it"
            )
        return self


def tf_kd(settings: TfKD, step: Step) -> dict[str, Tensor]:
    """`(1 - alpha) CE + alpha L`, L by `form`.

    virtual: `KL(softmax(u / T) || softmax(z))`, u the probabilities `correct` for the label (of a
    mixed view, its larger part) and the rest spread evenly. No cache is read.
    self: `T**2 KL(p(v; T) || p(z; T))`, which is `kd`, from the cache of a trained copy of the
    student.

    Source: Yuan et al., "Revisiting Knowledge Distillation via Label Smoothing Regularization",
    CVPR 2020, Tf-KD reg and Tf-KD self. Departures of its code from its paper, followed here:
    those of `virtual_teacher_loss`.
    """
    logits_BC = step.student(step.images_B3HW)
    if settings.form == "self":
        teacher_BC = step.teacher_logits(temperature=settings.temperature)[:, 0]
        loss = kd_loss(logits_BC, teacher_BC, temperature=settings.temperature)
    else:
        assert settings.correct is not None
        loss = virtual_teacher_loss(
            logits_BC,
            majority_labels(*step.labels),
            correct=settings.correct,
            temperature=settings.temperature,
        )
    return label_and_soft(step, logits_BC, loss, alpha=settings.alpha)


def _check_tf_kd(settings: TfKD, facts: RunFacts) -> None:
    """One teacher for form self; the virtual form reads none, whatever `caches` names."""
    if settings.form == "self":
        needs_one_teacher(settings, facts)


class DDGSD(MethodSettings):
    """Label losses of both views + consistency x KL each way + mmd x distance of mean features."""

    name: Literal["ddgsd"] = "ddgsd"
    temperature: Annotated[Temperature, Field(description="Of the views' KL.")] = 1.0
    consistency: Annotated[Weight, Field(description="Of the views' KL, lambda in the paper.")] = (
        1.0
    )
    mmd: Annotated[Weight, Field(description="Of the features, mu in the paper.")] = 5e-4
    teacher_temperature: Annotated[Temperature, Field(description="Of a cached teacher.")] = 4.0
    teacher_weight: Annotated[
        Weight, Field(description="Of a cached teacher, where there is one, on each view.")
    ] = 1.0


def ddgsd(settings: DDGSD, step: Step) -> dict[str, Tensor]:
    """`CE_a + CE_b + consistency T**2 (KL(a || b) + KL(b || a)) + mmd |mean h(a) - mean h(b)|**2`.

    a is a sample's view under the epoch's seed, b its view under another: see
    `distill.methods.requirements.other_seed`. Both go through the network in one batch, and
    gradients flow into both. h are the features that the classifier reads. Where `caches` names a
    teacher, its logits of both views are used: `+ teacher_weight T'**2 (KL(v_a || a) + KL(v_b ||
    b))` at T' = `teacher_temperature`. Without one, two seeds of `augment` give the pair.

    Source: Xu & Liu, "Data-Distortion Guided Self-Distillation for Deep Neural Networks", AAAI
    2019: T = 1, consistency 1, mmd 1e-4 to 5e-4, no teacher. Departures: those of `ddgsd_terms`.
    """
    second = step.other_views(SecondView)
    images_B3HW = torch.cat([step.images_B3HW, second.images_B3HW])
    logits_BC, features_BD = logits_and_features(step.student, images_B3HW)
    (logits_a_BC, logits_b_BC), features = logits_BC.chunk(2), features_BD.chunk(2)
    targets_BC = label_targets(
        step.labels.labels_B, num_classes=logits_a_BC.shape[-1], smoothing=step.label_smoothing
    )
    report_top1(step, logits_a_BC)
    unweighted = ddgsd_terms(
        # The distance of mean features is of all views of a step.
        SelfView(logits_a_BC, step.gather(features[0]), targets_BC),
        SelfView(logits_b_BC, step.gather(features[1]), targets_BC),
        temperature=settings.temperature,
    )
    weighted = unweighted.weighted(kl_weight=settings.consistency, mmd_weight=settings.mmd)
    terms: dict[str, Tensor] = weighted._asdict()
    if step.teachers:
        temperature = settings.teacher_temperature
        views = {"a": (logits_a_BC, step.teacher_logits), "b": (logits_b_BC, second.teacher_logits)}
        for name, (student_BC, teacher_logits) in views.items():
            teacher_BC = teacher_logits(temperature=temperature)[:, 0]
            soft = kd_loss(student_BC, teacher_BC, temperature=temperature)
            terms[f"soft_{name}"] = settings.teacher_weight * soft
    return terms


def _check_ddgsd(settings: DDGSD, facts: RunFacts) -> None:
    """No mixing, a student with features, and one teacher at most."""
    needs_unmixed(settings, facts, why="compares two views of each sample")
    if facts.teachers:
        needs_one_teacher(settings, facts)
    _needs_features(settings, facts)


class PSKD(MethodSettings):
    """Cross-entropy on (1 - a) label + a x the student's prediction an epoch before; no teacher."""

    name: Literal["ps-kd"] = "ps-kd"
    final_alpha: Annotated[
        float, Field(ge=0, le=1, description="Weight of the past predictions in the last epoch.")
    ] = 0.8


def ps_kd(settings: PSKD, step: Step) -> dict[str, Tensor]:
    """`CE(z, (1 - a_t) y + a_t p_{t-1})` in epoch t of E, with `a_t = final_alpha t / E`.

    p_{t-1} is the softmax of what the student predicted in training for its view of the sample in
    the epoch before, which is kept in `prediction_history` of `out`. A sample without a past
    prediction, as all are in the first epoch, keeps its label. Reports `alpha` and `recalled`, the
    fraction of samples that have one.

    Source: Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV
    2021, and its code. Departure: predictions are kept as float16 logits, theirs as probabilities.
    """
    assert step.history is not None
    logits_BC = step.student(step.images_B3HW)
    epoch = math.floor(step.epoch)
    step.history.write(epoch, step.samples_B, logits_BC.detach())
    past = step.history.read(epoch - 1, step.samples_B)
    alpha = pskd_alpha(step.epoch, epochs=step.epochs, final=settings.final_alpha)
    targets_BC = label_targets(
        step.labels.labels_B, num_classes=logits_BC.shape[-1], smoothing=step.label_smoothing
    )
    loss = pskd_loss(logits_BC, targets_BC, past.logits_BC, alpha=alpha, known_B=past.known_B)
    report_top1(step, logits_BC)
    step.metrics["alpha"] = torch.full((), alpha, device=logits_BC.device)
    step.metrics["recalled"] = past.known_B.float().mean()
    return {"label": loss}


class CSKD(MethodSettings):
    """Label loss + consistency x T**2 KL(pair || sample) at T; no teacher."""

    name: Literal["cs-kd"] = "cs-kd"
    temperature: Temperature = 4.0
    consistency: Annotated[Weight, Field(description="Of the KL to the same-class pair.")] = 1.0


def cs_kd(settings: CSKD, step: Step) -> dict[str, Tensor]:
    """`CE(z) + consistency T**2 KL(p(z'; T) || p(z; T))`, z' the logits of its same-class pair.

    That is a view of another sample of the same class, drawn anew each epoch, under the same seed.
    Its logits are computed in training mode without gradients. The only sample of a class is
    paired with itself.

    Source: Yun et al., "Regularizing Class-wise Predictions via Self-knowledge Distillation",
    CVPR 2020, and its code. Departure: that code draws the pair from all n samples of the class,
    so 1 of n samples is paired with itself; here none is that has another sample in its class.
    """
    logits_BC = step.student(step.images_B3HW)
    with torch.no_grad():
        pair_BC = step.student(step.other_views(SameClassPair).images_B3HW)
    loss = cskd_loss(logits_BC, pair_BC, temperature=settings.temperature)
    return {"label": label_term(step, logits_BC), "soft": settings.consistency * loss}


def logits_and_features(student: nn.Module, images_B3HW: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, C] and the classifier's input [B, D], from one forward pass.

    Raises:
        UnsupportedError: the network's classifier cannot be found, or does not run exactly once.
    """
    layer, inputs_seen = _classifier(student), []

    def note(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs_seen.append(inputs[0])

    handle = layer.register_forward_pre_hook(note)
    try:
        logits_BC: Tensor = student(images_B3HW)
    finally:
        handle.remove()
    if len(inputs_seen) != 1:
        raise UnsupportedError(
            f"{describe(student)} ran its classifier {len(inputs_seen)} times in one forward "
            "pass; it must run once."
        )
    return logits_BC, inputs_seen[0].flatten(1)


def _needs_features(settings: MethodSettings, facts: RunFacts) -> None:
    """A check: the student's logits are those of one linear layer on pooled features."""
    # A copy, because the student's batch norms would take in the images of the test.
    student = copy.deepcopy(facts.student).eval()
    layer = _classifier(student)
    side, weight = facts.input_size, layer.weight
    images_B3HW = torch.zeros(2, 3, side, side, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        logits_BC, features_BD = logits_and_features(student, images_B3HW)
        weight_CD = layer.weight.flatten(1)
        fits = features_BD.shape[1] == weight_CD.shape[1]
        if fits:
            bias = 0 if layer.bias is None else layer.bias
            fits = torch.allclose(features_BD @ weight_CD.T + bias, logits_BC, 1e-3, 1e-3)
    if not fits:
        raise UnsupportedError(
            f"method {settings.name} compares the features that the student classifies, but the "
            f"logits of {describe(student)} are more than one linear layer on them.",
            hint="Choose a network with one linear classifier, such as resnet18.",
        )


def _classifier(model: nn.Module) -> nn.Linear | nn.Conv2d:
    """The classifier that the network names, else its last linear layer."""
    get_classifier = getattr(model, "get_classifier", None)
    named = get_classifier() if callable(get_classifier) else None
    if isinstance(named, nn.Linear | nn.Conv2d):
        return named
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        raise UnsupportedError(f"{describe(model)} has no linear classifier.")
    return layers[-1]


METHODS = (
    Method(TfKD, tf_kd, (_check_tf_kd,)),
    Method(DDGSD, ddgsd, (_check_ddgsd,), lambda _: Requirements(other_views=(SecondView,))),
    Method(
        PSKD,
        ps_kd,
        (partial(needs_unmixed, why="uses its past prediction for each sample"),),
        lambda _: Requirements(prediction_history=True),
    ),
    Method(
        CSKD,
        cs_kd,
        (partial(needs_unmixed, why="compares views of one class"),),
        lambda _: Requirements(other_views=(SameClassPair,)),
    ),
)
