"""What a method of distillation is, what it may check before a run, and what it gets at each step.

A method is a frozen settings model and a function in the file of its family, and one line in that
file's `METHODS`. The function gets a `Step` and returns named terms, each a () float32 tensor with
its weight applied, in nats unless the method says otherwise; their sum is the loss.

Shape letters: B batch, R cells (0 is the whole image), C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from cache_service.config import Frozen
from cache_service.errors import ConfigError, UnsupportedError
from cache_service.format.spec import Preprocess
from distill.losses import label_loss, majority_labels
from distill.methods.prediction_history import PredictionHistory
from distill.methods.requirements import Pairing, Requirements


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
    """

    teachers: tuple[TeacherFacts, ...]
    student: nn.Module
    num_classes: int
    input_size: int
    mixes: bool = False


class TeacherLogits(Protocol):
    """`teacher_logits(temperature=1.0, cache=0)`: raw logits of a teacher, float32 [B, R, C].

    They are constants. `temperature` is the one that the logits will be used at; it matters to
    `topk` caches only, which choose the logits of dropped classes for it.
    """

    def __call__(self, *, temperature: float = 1.0, cache: int = 0) -> Tensor:
        """Raw logits."""
        ...


class ViewLabels(NamedTuple):
    """The labels of a batch, as `label_loss` and `majority_labels` take them.

    Attributes:
        labels_B: int64.
        partner_labels_B: int64, of the sample mixed into the view; the own label where unmixed.
        weights_B: float32 weight of the own label; 1.0 where unmixed.
    """

    labels_B: Tensor
    partner_labels_B: Tensor
    weights_B: Tensor


class OtherViews(NamedTuple):
    """One other view for each view of a batch, in the same order.

    Attributes:
        images_B3HW: normalized input.
        teacher_logits: the teachers' logits of these views.
    """

    images_B3HW: Tensor
    teacher_logits: TeacherLogits


class PeerLogits(NamedTuple):
    """Raw logits [B, C] of the students that learn from each other, for one batch.

    Attributes:
        own_BC: this student's, with gradients.
        others: those of every other peer, constants.
    """

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


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


def _no_requirements(_settings: MethodSettings) -> Requirements:
    return Requirements()


@dataclass(frozen=True)
class Method(Generic[SettingsT]):
    """A method as the registry holds it.

    Attributes:
        settings: its part of the train file, `method: {name: ..., ...}`.
        terms: the function.
        checks: each refuses, with ConfigError or UnsupportedError, what it cannot train from.
        requirements: what it requires beyond one view of each sample.
    """

    settings: type[SettingsT]
    terms: Callable[[SettingsT, Step], dict[str, Tensor]]
    checks: tuple[Callable[[SettingsT, RunFacts], None], ...] = ()
    requirements: Callable[[SettingsT], Requirements] = _no_requirements

    @property
    def name(self) -> str:
        """The value of `method.name` in a train file."""
        name: Any = self.settings.model_fields["name"].default
        return str(name)

    def check(self, settings: SettingsT, facts: RunFacts) -> None:
        """Refuse a run that the method cannot train from.

        Raises:
            ConfigError, UnsupportedError: see the message.
        """
        for check in self.checks:
            check(settings, facts)


def label_term(step: Step, logits_BC: Tensor) -> Tensor:
    """The label loss on the student's ordinary logits: hard, mixed or smoothed as the batch is.

    Also reports `top1`, the fraction of views whose larger part is classified correctly.
    """
    report_top1(step, logits_BC)
    return label_loss(logits_BC, *step.labels, smoothing=step.label_smoothing)


def report_top1(step: Step, logits_BC: Tensor) -> None:
    """Report the fraction of views whose larger part is classified correctly, as `top1`."""
    right_B = logits_BC.detach().argmax(dim=-1) == majority_labels(*step.labels)
    step.metrics["top1"] = right_B.float().mean()


def needs_one_teacher(settings: MethodSettings, facts: RunFacts) -> None:
    """A check: exactly one teacher, of the student's classes."""
    if not facts.teachers:
        raise ConfigError(
            f"method {settings.name} learns from a teacher, but `caches` is empty.",
            hint="Name a cache under `caches`, or train with `method: {name: ce}`.",
        )
    if len(facts.teachers) > 1:
        origins = ", ".join(teacher.origin for teacher in facts.teachers)
        raise ConfigError(
            f"method {settings.name} learns from one teacher, but `caches` names "
            f"{len(facts.teachers)}: {origins}."
        )
    _needs_the_same_classes(facts)


def needs_teachers(settings: MethodSettings, facts: RunFacts) -> None:
    """A check: one teacher or several, each of the student's classes."""
    if not facts.teachers:
        raise ConfigError(
            f"method {settings.name} learns from one teacher or several, but `caches` is empty.",
            hint="Name them under `caches`, or train with `method: {name: ce}`.",
        )
    _needs_the_same_classes(facts)


def _needs_the_same_classes(facts: RunFacts) -> None:
    for teacher in facts.teachers:
        if teacher.num_classes != facts.num_classes:
            raise ConfigError(
                f"{teacher.origin} has logits for {teacher.num_classes} classes, but the student "
                f"has {facts.num_classes}."
            )


def needs_unmixed(settings: MethodSettings, facts: RunFacts, *, why: str) -> None:
    """A check: no sample is mixed into another.

    Args:
        settings: of the method.
        facts: of the run.
        why: what the method does that mixed views do not allow, for the message.
    """
    if facts.mixes:
        raise UnsupportedError(
            f"method {settings.name} {why}, but the recipe mixes samples (mixup or cutmix).",
            hint="Leave mixup and cutmix out of `augment`, and record the cache again.",
        )


def needs_every_logit(settings: MethodSettings, facts: RunFacts, *, why: str) -> None:
    """A check: no teacher's cache dropped classes.

    Args:
        settings: of the method.
        facts: of the run.
        why: what the method does with all logits, for the message.
    """
    for teacher in facts.teachers:
        if teacher.drops_classes:
            raise UnsupportedError(
                f"method {settings.name} {why}, but {teacher.origin} keeps only the largest "
                "(codec topk).",
                hint="Record another cache with `kd-cache build FILE --set codec.kind=int8`.",
            )


def depends_on_temperature(step: Step) -> bool:
    """Whether the teacher's logits differ by temperature, because its cache dropped classes."""
    return step.teachers[0].drops_classes
