"""What the tables on CIFAR-100 share: images, and the files of teachers and students."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from cache_service.configfile import validate_config
from cache_service.errors import UntrainedTeacherError
from cache_service.format.frozen import Frozen
from cli.experiments.reproduce.cifar import FACTORY, SIDE, decode
from cli.experiments.reproduce.cohort import Outcome, cohort_seconds, train_cohort
from cli.experiments.reproduce.order import Order
from cli.experiments.reproduce.runs import record_teacher
from distill.config import TrainConfig
from distill.export import STUDENT_NAME
from distill.optim import SGD, OptimizerConfig
from distill.schedule import MultiStep, ScheduleConfig
from distill.scores import Evaluation

Count = Annotated[int, Field(ge=1)]

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
"""Of CIFAR-100's training images."""

Document = dict[str, Any]


class ImageSettings(Frozen):
    """Which part of CIFAR-100; by default all of it."""

    num_classes: Annotated[int | None, Field(ge=2, description="Spread over all; null: all.")] = (
        None
    )
    per_class: Annotated[int | None, Field(ge=1, description="Training images; null: all.")] = None
    shrink: Annotated[Literal[1, 2, 4], Field(description="Averages blocks of so many px.")] = 1
    view_size: Annotated[int | None, Field(ge=8, description="px; the image's if null.")] = None
    preset: Annotated[
        Literal["imagenet", "deit"] | None, Field(description="Null: pad, crop, mirror.")
    ] = None
    padding: Annotated[int, Field(ge=0, description="px, at 32 px.")] = 4
    workers: Annotated[
        int, Field(ge=0, description="Processes that render views which are not cut on the device.")
    ] = 0

    @property
    def size(self) -> int:
        """Side of the views, px."""
        return self.view_size or SIDE // self.shrink

    def augment(self) -> Document:
        """`augment:` of a build or train file."""
        if self.preset is not None:
            return {"preset": self.preset, "size": self.size}
        crop = {"op": "pad_crop", "padding": self.padding * self.size // SIDE}
        return {"size": self.size, "ops": [crop, {"op": "horizontal_flip"}]}


class TrainingSettings(Frozen):
    """How a network is trained; by default as in the tables of Wei et al., CVPR 2024."""

    optimizer: OptimizerConfig = SGD(lr=0.05, weight_decay=5e-4)
    schedule: ScheduleConfig = MultiStep(milestones=(150, 180, 210))
    epochs: Count = 240
    batch_size: Count = 64
    clip_grad_norm: Annotated[float | None, Field(gt=0)] = 40.0
    amp: Literal["none", "bfloat16", "float16"] = "none"

    def document(self) -> Document:
        """These keys of a train file."""
        return self.model_dump(mode="json")


class Recording(NamedTuple):
    """What a teacher said.

    Attributes:
        cache: its folder; None where there is none.
        seconds: that recording took.
        problem: why there is none.
    """

    cache: str | None = None
    seconds: float = 0.0
    problem: str | None = None


class School(NamedTuple):
    """The runs of one reproduction, started or taken up again.

    Attributes:
        name: of the reproduction; everything lies in a folder of that name.
        images: what is looked at.
        order: folders, device, and who is told.
    """

    name: str
    images: ImageSettings
    order: Order

    def open(self) -> None:
        """Decode CIFAR-100, once for all reproductions.

        Raises:
            DatasetError: it is not where it should be.
        """
        decode(self.order.data, self._decoded)

    def dataset(self, part: str) -> Document:
        """`dataset:` of a build or train file."""
        args: Document = {"part": part, "num_classes": self.images.num_classes}
        args["shrink"] = self.images.shrink
        if part == "train":
            args["per_class"] = self.images.per_class
        return {"name": FACTORY, "root": self._decoded, "split": part, "args": args}

    def train(
        self,
        students: Mapping[str, Document],
        training: TrainingSettings,
        *,
        folder: str,
        learns: Document,
    ) -> dict[str, Outcome]:
        """Students on one stream.

        Args:
            students: what each has of its own, by name.
            training: what they have in common.
            folder: of these runs.
            learns: `caches`, or `augment` without any, and `seeds`.
        """
        configs = {
            name: validate_config(
                TrainConfig,
                {
                    "dataset": self.dataset("train"),
                    **learns,
                    **training.document(),
                    "device": self.order.device,
                    "workers": self.images.workers,
                    "evaluate": {"dataset": self.dataset("test"), "batch_size": 500},
                    "out": self.order.folder(self.name, folder, name),
                    **own,
                },
                where=f"{self.name} {folder} {name}",
            )
            for name, own in students.items()
        }
        return train_cohort(configs, title=f"{self.name} {folder}", say=self.order.say)

    def teach(
        self, network: Document, training: TrainingSettings, *, name: str, seed: int = 0
    ) -> Outcome:
        """A teacher of the project's own, on labels, on views that no student sees again."""
        own = {"student": network, "method": {"name": "ce"}, "seed": seed}
        learns = {"augment": self.images.augment()}
        return self.train({name: own}, training, folder="teachers", learns=learns)[name]

    def record(
        self, teacher: Outcome, *, name: str, recorded: int, recording: Document
    ) -> Recording:
        """Record a trained teacher.

        Args:
            teacher: its run.
            name: of the recording.
            recorded: epochs.
            recording: scales, codec and what else a build file may say.
        """
        if teacher.failure is not None:
            return Recording(problem=f"no recording: {teacher.failure}")
        student = teacher.config.student
        cache = self.order.folder(self.name, "recordings", name, "cache")
        document = {
            "cache": cache,
            "dataset": self.dataset("train"),
            "augment": self.images.augment(),
            "seeds": f"0:{recorded}",
            "teacher": {
                "model": student.model,
                "model_args": student.model_args,
                "checkpoint": str(Path(teacher.config.out, STUDENT_NAME)),
            },
            "batch_size": 500,
            "workers": self.images.workers,
            "device": self.order.device,
            **recording,
        }
        try:
            title = f"{self.name} recording {name}"
            seconds = record_teacher(document, title=title, say=self.order.say)
        except UntrainedTeacherError as failure:
            reason = failure.message.partition(". ")[0]  # what follows is advice
            return Recording(problem=f"no recording: {reason}")
        return Recording(cache=cache, seconds=seconds)

    @property
    def _decoded(self) -> str:
        return str(Path(self.order.out, "cifar100"))


def network(model: str, **model_args: Any) -> Document:
    """`student:` of a train file, normalized as CIFAR-100 is."""
    return {"model": model, "model_args": model_args, "mean": list(MEAN), "std": list(STD)}


def error_rate(evaluation: Evaluation) -> float:
    """Top-1, %."""
    return round(100 - 100 * evaluation.top1, 4)


def top5_error_rate(evaluation: Evaluation) -> float:
    """Share of the test set without the label among the five likeliest classes, %."""
    return round(100 - 100 * evaluation.top5, 4)


def accuracy(evaluation: Evaluation) -> float:
    """Top-1, %."""
    return round(100 * evaluation.top1, 4)


def seconds_of(outcomes: Mapping[str, Outcome]) -> float:
    """Seconds of the epochs of these runs."""
    return cohort_seconds(outcome.config.out for outcome in outcomes.values())
