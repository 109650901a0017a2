"""Teachers and students of the scale decoupled tables on CIFAR-100, with the published figures."""

from __future__ import annotations

from pydantic import Field

from cache_service.errors import ConfigError
from cache_service.format.frozen import Frozen
from cli.experiments.reproduce.school import Document, network
from cli.experiments.reproduce.small_nets import RESNET
from cli.experiments.reproduce.table import Figure

SOURCE = "Wei, Luo, Luo: Scale Decoupled Distillation, CVPR 2024, the tables on CIFAR-100"

Published = dict[str, Figure | tuple[Figure, Figure]]


class Pair(Frozen):
    """A teacher and a student.

    Attributes:
        title: as the paper writes it.
        teacher, student: networks.
        scales: {1, 2} for like architectures, {1, 2, 4} for unlike ones. MobileNetV2, whose map is
            2 x 2, has {1, 2}; its published runs add a grid of 4 x 4 that repeats these pixels.
        beta: of DKD and its scale decoupled form; gamma of SD-NKD.
        light: a ShuffleNet or MobileNet student, which has a lower learning rate.
        published: top-1 accuracy, %, by `teacher` and method.
    """

    title: str
    teacher: Document
    student: Document
    scales: tuple[int, ...] = (1, 2, 4)
    beta: float = 8.0
    light: bool = False
    published: Published = Field(default_factory=dict)


_LIKE = (1, 2)

_MODELS = {
    "resnet32x4": "resnet32x4",
    "resnet8x4": "resnet8x4",
    "wrn_40_2": "wrn_40_2",
    "wrn_16_2": "wrn_16_2",
    "ResNet50": "cifar_resnet50",
    "vgg13": "cifar_vgg13",
    "vgg8": "cifar_vgg8",
    "ShuffleNetV1": "cifar_shufflenetv1",
    "ShuffleNetV2": "cifar_shufflenetv2",
    "MobileNetV2": "cifar_mobilenetv2",
}
"""This project's names of the paper's networks."""

_COLUMNS = ("teacher", "ce", "kd", "dkd", "nkd", "sd-kd", "sd-dkd", "sd-nkd")

_TABLE: dict[str, tuple[Figure | tuple[Figure, Figure] | None, ...]] = {
    "resnet32x4:resnet8x4": (79.42, 72.5, 73.33, 76.32, None, (75.3, 75.6), None, (76.3, 76.5)),
    "resnet32x4:ShuffleNetV1": (79.42, 70.5, 74.07, 76.45, 75.31, 76.3, 77.3, 76.34),
    "resnet32x4:ShuffleNetV2": (79.42, 71.82, 74.45, 77.07, 76.26, 76.67, 78.05, 77.07),
    "wrn_40_2:ShuffleNetV1": (75.61, 70.5, 74.83, 76.7, 75.96, 76.65, 77.21, 76.81),
    "ResNet50:MobileNetV2": (79.34, 64.6, 67.35, 70.35, 69.39, 69.55, 71.36, 70.25),
    "ResNet50:vgg8": (79.34, 70.36, 73.81, 75.34, 74.01, 74.89, 75.86, 74.62),
    "vgg13:MobileNetV2": (74.64, 64.6, 67.37, 69.71, 68.72, 68.79, 70.25, 69.5),
    "vgg13:vgg8": (74.64, 70.36, 72.98, 74.68, None, (73.4, 73.5), (74.3, 74.5), (73.8, 74.0)),
    "wrn_40_2:wrn_16_2": (75.61, 73.26, 74.92, 76.23, None, None, None, None),
}

_LIKE_PAIRS = ("resnet32x4:resnet8x4", "vgg13:vgg8", "wrn_40_2:wrn_16_2")
_BETA_6 = ("wrn_40_2:wrn_16_2",)

USUAL = ("resnet32x4:resnet8x4", "resnet32x4:ShuffleNetV2", "wrn_40_2:ShuffleNetV1")

QUICK = Pair(
    title="resnet14 (128 channels) -> resnet8 (32 channels)",
    teacher=network(RESNET, depth=14, widths=[16, 32, 64, 128]),
    student=network(RESNET, depth=8, widths=[8, 8, 16, 32]),
    scales=_LIKE,
)
"""Small enough for a CPU; nobody published it."""


def find_pair(written: str) -> Pair:
    """The pair of `TEACHER:STUDENT`, by the paper's names or this project's, in any case.

    Raises:
        ConfigError: there is none; lists those there are.
    """
    known = {_plain(name): name for name in _TABLE}
    if _plain(written) not in known:
        raise ConfigError(f"there is no pair {written!r}.", hint=f"There are {', '.join(_TABLE)}.")
    return _pair(known[_plain(written)])


def _pair(name: str) -> Pair:
    teacher, student = name.split(":")
    is_like = name in _LIKE_PAIRS or student == "MobileNetV2"
    figures = zip(_COLUMNS, _TABLE[name], strict=True)
    return Pair(
        title=name.replace(":", " -> "),
        teacher=network(_MODELS[teacher]),
        student=network(_MODELS[student]),
        scales=_LIKE if is_like else (1, 2, 4),
        beta=6.0 if teacher == "vgg13" or name in _BETA_6 else 8.0,
        light="Net" in student,
        published={column: figure for column, figure in figures if figure is not None},
    )


def _plain(written: str) -> str:
    return written.lower().replace("cifar_", "").replace("_", "")
