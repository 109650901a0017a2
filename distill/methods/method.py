"""What a method of distillation is, what it may check before a run, and what it gets at each step.

A method is a frozen settings model and a function in the file of its family, and one line in that
file's `METHODS`. The function gets a `Step` and returns named terms, each a () float32 tensor with
its weight applied, in nats unless the method says otherwise; their sum is the loss.

Shape letters: B batch, R cells (0 is the whole image), C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from cache_service.config import Frozen
from cache_service.format.spec import Preprocess
from distill.losses import label_loss, majority_labels
from distill.methods.prediction_history import PredictionHistory
from distill.methods.requirements import Pairing, Requirements

TeacherLogits = Callable[..., Tensor]
"""`teacher_logits(temperature=1.0, cache=0)`: a teacher's raw logits, constants, float32 [B, R, C].

`temperature` is the one that the logits will be used at; it matters to `topk` caches only, which
choose the logits of dropped classes for it."""


class MethodSettings(Frozen):
    """Base of every method's settings. Subclasses pin `name` to a Literal with that default."""

    name: str


class TeacherFacts(NamedTuple):
    """What is known of a teacher before any row is read.

    Attributes:
        scales: grids of cells that have logits; the first is 1, the whole image.
        num_classes: of its logits.
        pooling: how its cells were pooled; the student's are pooled alike.
        origin: where its logits come from, for messages: the URL of a cache.
        preprocess: how it prepares a view; the student does the same unless configured otherwise.
        drops_classes: whether its cache stores single logits of some classes only.
    """

    scales: tuple[int, ...]
    num_classes: int
    pooling: Literal["direct", "chained"] = "direct"
    origin: str = "a live teacher"
    preprocess: Preprocess | None = None
    drops_classes: bool = False


class RunFacts(NamedTuple):
    """What a method may check before the run starts.

    Attributes:
        teachers: in the order of `caches`.
        student: the network, on its device.
        num_classes: of the dataset and the student.
        input_size: side of the student's input, px.
        mixes: whether the recipe mixes samples into each other.
        channels: of the student's input.
    """

    teachers: tuple[TeacherFacts, ...]
    student: nn.Module
    num_classes: int
    input_size: int
    mixes: bool = False
    channels: int = 3


class ViewLabels(NamedTuple):
    """Labels of a batch, int64, those of mixing partners, and float32 weights of the own labels."""

    labels_B: Tensor
    partner_labels_B: Tensor
    weights_B: Tensor


class OtherViews(NamedTuple):
    """One other view for each view of a batch, in the same order: normalized input, and logits."""

    images_B3HW: Tensor
    teacher_logits: TeacherLogits


class PeerLogits(NamedTuple):
    """Raw logits [B, C] of a student, with gradients, and of all its peers, constants."""

    own_BC: Tensor
    others: tuple[Tensor, ...]


class Step(NamedTuple):
    """What a method gets for one batch. All tensors are on the student's device.

    Attributes:
        student: the network, in training mode.
        images_B3HW: normalized input.
        labels: labels, partners and weights of the views.
        samples_B: int64 dataset items.
        teacher_logits: the recorded (or live) teachers' logits of exactly these views.
        teachers: facts about the teachers, in the order of `caches`.
        epoch: fractional, 0.0 at the start of training: for warm-ups and schedules.
        epochs: length of the run.
        label_smoothing: of the label loss.
        metrics: a method may add detached () tensors; they are reported and never summed.
        other_views: for a method that requires other views: those of one of its pairings.
        history: for a method that requires the prediction history.
        peers: for a method that requires peers. Such a method does not call `student`, because
            the forward pass has been made already.
        gather: function from rows of these views, [B, ...], to those of all ranks' views: for a
            term that is more than a mean over views. Gradients flow through it.
    """

    student: nn.Module
    images_B3HW: Tensor
    labels: ViewLabels
    samples_B: Tensor
    teacher_logits: TeacherLogits
    teachers: tuple[TeacherFacts, ...]
    epoch: float
    epochs: int
    label_smoothing: float
    metrics: dict[str, Tensor]
    other_views: Callable[[type[Pairing]], OtherViews]
    history: PredictionHistory | None = None
    peers: PeerLogits | None = None
    gather: Callable[[Tensor], Tensor] = lambda rows: rows

    def warm_up(self, epochs: float) -> float:
        """min(n / epochs, 1) in the n-th epoch, n from 1; 1 where `epochs` is 0.

        The factor of the teacher's term in DKD, NKD and their forms on cells, constant within an
        epoch, as in mdistiller and the SDD code: 20 epochs on CIFAR-100, 1 on ImageNet.
        """
        return min((math.floor(self.epoch) + 1) / epochs, 1.0) if epochs > 0 else 1.0


@dataclass(frozen=True)
class Method:
    """A method as the registry holds it.

    Attributes:
        settings: its part of the train file, `method: {name: ..., ...}`.
        terms: the function of settings and step.
        checks: each refuses, with ConfigError or UnsupportedError, what it cannot train from.
        requirements: what it requires beyond one view of each sample.
    """

    settings: type[MethodSettings]
    terms: Callable[[Any, Step], dict[str, Tensor]]
    checks: tuple[Callable[[Any, RunFacts], None], ...] = ()
    requirements: Callable[[Any], Requirements] = lambda _settings: Requirements()

    @property
    def name(self) -> str:
        """The value of `method.name` in a train file."""
        return str(self.settings.model_fields["name"].default)

    def check(self, settings: MethodSettings, facts: RunFacts) -> None:
        """Refuse a run that the method cannot train from, with the error of the first check."""
        for check in self.checks:
            check(settings, facts)


def label_term(step: Step, logits_BC: Tensor) -> Tensor:
    """The label loss on the student's ordinary logits: hard, mixed or smoothed as the batch is.

    Also reports `top1`, the fraction of views whose larger part is classified correctly.
    """
    report_top1(step, logits_BC)
    return label_loss(logits_BC, *step.labels, smoothing=step.label_smoothing)


def label_and_soft(
    step: Step, logits_BC: Tensor, soft: Tensor, *, alpha: float
) -> dict[str, Tensor]:
    """The terms `(1 - alpha) label` and `alpha soft`."""
    return {"label": (1 - alpha) * label_term(step, logits_BC), "soft": alpha * soft}


def report_top1(step: Step, logits_BC: Tensor) -> None:
    """Report the fraction of views whose larger part is classified correctly, as `top1`."""
    right_B = logits_BC.detach().argmax(dim=-1) == majority_labels(*step.labels)
    step.metrics["top1"] = right_B.float().mean()
