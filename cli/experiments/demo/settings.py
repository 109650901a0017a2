"""What the demo does, as one frozen value: networks, sizes, lengths. Nothing else decides them."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from cache_service.config import Frozen


class DemoSettings(Frozen):
    """Sizes that fit a minute on one core, and in which the teacher is much the larger network.

    The student is the teacher's own architecture at an eighth of its width: 1/60 of the weights.
    Its four epochs are too few on purpose. Digits are easy: given ten epochs the student reaches
    98 % with a teacher or without.
    """

    view_size: Annotated[
        int, Field(ge=8, description="px; digits are 8 px. 16 px give a 4 x 4 map, so 4 x 4 cells.")
    ] = 16
    padding: Annotated[int, Field(ge=0, description="px by which a view may be moved.")] = 2
    scales: tuple[int, ...] = (1, 2, 4)

    teacher_model: str = "resnet8x4"
    teacher_epochs: Annotated[int, Field(ge=1)] = 4
    teacher_lr: Annotated[float, Field(gt=0)] = 0.1

    student_model: str = "cache_service.models.zoo.resnet:ResNet"
    student_args: dict[str, Any] = Field(
        default_factory=lambda: {"depth": 8, "widths": [8, 8, 16, 32]}
    )
    epochs: Annotated[int, Field(ge=1, description="Each is a recorded seed of its own.")] = 4
    lr: Annotated[
        float, Field(gt=0, description="With batches of 64, as in the CIFAR-100 tables.")
    ] = 0.05

    batch_size: Annotated[int, Field(ge=1)] = 64
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0
    device: str = "auto"
    threads: Annotated[
        int,
        Field(ge=1, description="One: the numbers then do not depend on how many cores there are."),
    ] = 1


class Way(NamedTuple):
    """One way to train the student.

    Attributes:
        name: of its folder, its train file and its row.
        title: for people.
        method: of the train file.
        teacher: whom it asks.
    """

    name: str
    title: str
    method: str
    teacher: Literal["none", "live", "cache"]


ALONE = Way("alone", "Alone", "ce", "none")
LIVE = Way("live", "Live teacher, KD", "kd", "live")
CACHED_KD = Way("kd", "Cache, KD", "kd", "cache")
CACHED_SD_KD = Way("sd-kd", "Cache, SD-KD", "sd-kd", "cache")
WAYS = (ALONE, LIVE, CACHED_KD, CACHED_SD_KD)
