"""What a method of distillation is, and what it sees.

A method is one file with one frozen settings model and one function; `distill/methods/__init__.py`
has its line of registration. The function gets a `Step` and returns named terms, each a () float32
tensor in nats with its weight applied; their sum is the loss.

Shape letters: B batch, R cells (0 is the whole image), C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from cache_service.errors import ConfigError
from cache_service.format.frozen import Frozen
from cache_service.format.spec import Preprocess
from distill.batches import Batch
from distill.losses import label_loss, majority_labels


class MethodSettings(Frozen):
    """Base of every method's settings. Subclasses pin `name` to a Literal with that default."""

    name: str


class TeacherFacts(NamedTuple):
    """What is known of a teacher before any row is read.

    Attributes:
        scales: grids of cells that it answers for; the first is 1, the whole image.
        num_classes: of its answers.
        pooling: how its cells were pooled; a student's are pooled alike.
        origin: where its answers come from, for messages: a cache's URL.
        preprocess: what it does to a view; a student does the same unless told otherwise.
        codec: kind of its cache's codec; None of a live teacher, which leaves nothing out.
    """

    scales: tuple[int, ...]
    num_classes: int
    pooling: Literal["direct", "chained"] = "direct"
    origin: str = "a live teacher"
    preprocess: Preprocess | None = None
    codec: Literal["dense", "int8", "topk", "features"] | None = None


class Plan(NamedTuple):
    """What a method may check before the run starts.

    Attributes:
        teachers: in the order of `caches`.
        student: the network, on its device.
        num_classes: of the dataset and the student.
        input_size: side in px of what the student is fed.
    """

    teachers: tuple[TeacherFacts, ...]
    student: nn.Module
    num_classes: int
    input_size: int


class Teach(Protocol):
    """`teacher(temperature=1.0, cache=0)`: a teacher's logits of this batch, float32 [B, R, C].

    `temperature` is the one they will be used at; it matters to `topk` caches only.
    """

    def __call__(self, *, temperature: float = 1.0, cache: int = 0) -> Tensor:
        """Raw logits, constants."""
        ...


class Step(NamedTuple):
    """What a method sees of one batch. Everything lies on the student's device.

    Attributes:
        student: the network, in training mode.
        images_B3HW: normalized input.
        batch: labels, partners, samples, and the views as uint8.
        teacher: the recorded (or live) teachers' answers to exactly these views.
        teachers: what is known of them, in the same order.
        epoch: fractional, 0.0 at the start of training: for warm-ups and schedules.
        label_smoothing: of the label loss.
        metrics: a method may add detached () tensors; they are reported, never summed.
    """

    student: nn.Module
    images_B3HW: Tensor
    batch: Batch
    teacher: Teach
    teachers: tuple[TeacherFacts, ...]
    epoch: float
    label_smoothing: float
    metrics: dict[str, Tensor]


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


@dataclass(frozen=True)
class Method(Generic[SettingsT]):
    """A method as the registry holds it.

    Attributes:
        settings: its part of the train file, `method: {name: ..., ...}`.
        terms: the function.
        check: refuses, with ConfigError or UnsupportedError, what it cannot train from.
    """

    settings: type[SettingsT]
    terms: Callable[[SettingsT, Step], dict[str, Tensor]]
    check: Callable[[SettingsT, Plan], None]

    @property
    def name(self) -> str:
        """The word that users write."""
        name: Any = self.settings.model_fields["name"].default
        return str(name)


def label_term(step: Step, logits_BC: Tensor) -> Tensor:
    """The label loss on the student's ordinary logits: hard, mixed or smoothed as the batch is.

    Also reports `top1`, the share of views whose larger part is classified right.
    """
    batch = step.batch
    labels = (batch.labels_B, batch.partner_labels_B, batch.weights_B)
    right_B = logits_BC.detach().argmax(dim=-1) == majority_labels(*labels)
    step.metrics["top1"] = right_B.float().mean()
    return label_loss(logits_BC, *labels, smoothing=step.label_smoothing)


def needs_no_teacher(_settings: MethodSettings, _plan: Plan) -> None:
    """A check for methods that learn from labels alone."""


def needs_one_teacher(settings: MethodSettings, plan: Plan) -> None:
    """A check for methods that learn from one teacher of the student's classes."""
    if not plan.teachers:
        raise ConfigError(
            f"method {settings.name} learns from a teacher, but `caches` is empty.",
            hint="Name a cache under `caches`, or train with `method: {name: ce}`.",
        )
    if len(plan.teachers) > 1:
        origins = ", ".join(teacher.origin for teacher in plan.teachers)
        raise ConfigError(
            f"method {settings.name} learns from one teacher, but `caches` names "
            f"{len(plan.teachers)}: {origins}."
        )
    (teacher,) = plan.teachers
    if teacher.num_classes != plan.num_classes:
        raise ConfigError(
            f"{teacher.origin} answers for {teacher.num_classes} classes, but the student has "
            f"{plan.num_classes}."
        )
