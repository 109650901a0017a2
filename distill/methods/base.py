"""What a method of distillation is, and what it sees.

A method is one file with one frozen settings model and one function; `distill/methods/__init__.py`
has its line of registration. The function gets a `Step` and returns named terms, each a () float32
tensor with its weight applied, in nats unless the method says otherwise; their sum is the loss.

Shape letters: B batch, R cells (0 is the whole image), C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor, nn

from cache_service.errors import ConfigError, UnsupportedError
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
        mixes: the recipe mixes samples into each other.
    """

    teachers: tuple[TeacherFacts, ...]
    student: nn.Module
    num_classes: int
    input_size: int
    mixes: bool = False


class Needs(NamedTuple):
    """What a method needs beyond the views of a seed in their order.

    Attributes:
        again: another view of each sample, that of another seed.
        classmates: a view of another sample of each one's class, under the same seed.
        memory: what the student itself said about each sample an epoch before.
        special: epochs that are half of samples of these classes, half of a draw of all others.
    """

    again: bool = False
    classmates: bool = False
    memory: bool = False
    special: tuple[int, ...] | None = None


class Teach(Protocol):
    """`teacher(temperature=1.0, cache=0)`: a teacher's logits of this batch, float32 [B, R, C].

    `temperature` is the one they will be used at; it matters to `topk` caches only. `views` asks
    about other views instead: `batch.again`, or `batch.classmates`.
    """

    def __call__(
        self, *, temperature: float = 1.0, cache: int = 0, views: Batch | None = None
    ) -> Tensor:
        """Raw logits, constants."""
        ...


class Remembered(NamedTuple):
    """What a student said about each sample an epoch before.

    Attributes:
        logits_BC: float32, up to an offset of each row; zeros where it said nothing.
        known_B: bool, whether it said anything.
    """

    logits_BC: Tensor
    known_B: Tensor


class Memory(Protocol):
    """A student's own answers, kept from one epoch to the next."""

    def recall(self, epoch: int, samples_B: Tensor) -> Remembered:
        """What it said about these samples in an epoch."""
        ...

    def remember(self, epoch: int, samples_B: Tensor, logits_BC: Tensor) -> None:
        """Keep what it says now."""
        ...


class PeerLogits(NamedTuple):
    """What the students of one stream say of one batch, raw logits [B, C].

    Attributes:
        own_BC: this student's, with gradients.
        others: every other peer's, constants.
    """

    own_BC: Tensor
    others: tuple[Tensor, ...]


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
        peers: for a method that asks its peers: what they and the student itself say. Such a
            method leaves `student` alone: it has answered already.
        epochs: length of the run.
        see: other views as the student sees them, normalized [B, 3, H, W].
        memory: for a method that needs it.
    """

    student: nn.Module
    images_B3HW: Tensor
    batch: Batch
    teacher: Teach
    teachers: tuple[TeacherFacts, ...]
    epoch: float
    label_smoothing: float
    metrics: dict[str, Tensor]
    peers: PeerLogits | None = None
    epochs: int = 1
    see: Callable[[Batch], Tensor] | None = None
    memory: Memory | None = None


SettingsT = TypeVar("SettingsT", bound=MethodSettings)


def needs_views_only(_settings: MethodSettings) -> Needs:
    """What most methods need: nothing special."""
    return Needs()


@dataclass(frozen=True)
class Method(Generic[SettingsT]):
    """A method as the registry holds it.

    Attributes:
        settings: its part of the train file, `method: {name: ..., ...}`.
        terms: the function.
        check: refuses, with ConfigError or UnsupportedError, what it cannot train from.
        asks_peers: a student learns from what the others of its run with this method say.
        needs: what it needs of the stream, and of its student's past.
    """

    settings: type[SettingsT]
    terms: Callable[[SettingsT, Step], dict[str, Tensor]]
    check: Callable[[SettingsT, Plan], None]
    asks_peers: bool = False
    needs: Callable[[SettingsT], Needs] = needs_views_only

    @property
    def name(self) -> str:
        """The word that users write."""
        name: Any = self.settings.model_fields["name"].default
        return str(name)


def label_term(step: Step, logits_BC: Tensor) -> Tensor:
    """The label loss on the student's ordinary logits: hard, mixed or smoothed as the batch is.

    Also reports `top1`, the share of views whose larger part is classified right.
    """
    report_top1(step, logits_BC)
    return label_loss(logits_BC, *step.batch[1:4], smoothing=step.label_smoothing)


def report_top1(step: Step, logits_BC: Tensor) -> None:
    """Report the share of views whose larger part is classified right, as `top1`."""
    right_B = logits_BC.detach().argmax(dim=-1) == majority_labels(*step.batch[1:4])
    step.metrics["top1"] = right_B.float().mean()


def see_others(step: Step, views: Batch | None) -> tuple[Batch, Tensor]:
    """The views that came with a batch for comparison, and what the student sees of them.

    Raises:
        UnsupportedError: the run's stream brings none.
    """
    if views is None or step.see is None:
        raise UnsupportedError(
            "the stream of this run brings no other views beside each batch's own.",
            hint="Train from a train file, or give a stream of your own `Batch.again` and "
            "`Batch.classmates`.",
        )
    return views, step.see(views)


def needs_unmixed(settings: MethodSettings, plan: Plan, *, why: str) -> None:
    """A check: no sample is mixed into another.

    Args:
        settings: of the method.
        plan: of the run.
        why: what the method does that mixed views cannot serve, for the message.
    """
    if plan.mixes:
        raise UnsupportedError(
            f"method {settings.name} {why}, but the recipe mixes samples (mixup or cutmix).",
            hint="Leave mixup and cutmix out of `augment`, and record the cache again.",
        )


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
