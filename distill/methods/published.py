"""Settings with which the methods were published, by data and networks.

The only place where they are kept: docs/methods.md lists them, and reproductions are tested against
them. `method` and `train` are keys of a train file and `build` keys of a build file, in the form in
which a user writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

Document = Mapping[str, Any]

CIFAR = "CIFAR-100"
IMAGENET = "ImageNet"


class Published(NamedTuple):
    """The settings of one method on one dataset.

    Attributes:
        data: dataset, and the networks if the settings depend on them.
        method: section `method` of the train file.
        source: whose runs had these settings.
        train: other keys of the train file.
        build: keys of the build file.
        note: what these keys cannot express.
    """

    data: str
    method: Document
    source: str
    train: Document = MappingProxyType({})
    build: Document = MappingProxyType({})
    note: str = ""

    @property
    def name(self) -> str:
        """The method's name."""
        return str(self.method["name"])


MDISTILLER = "mdistiller (DKD)"
SDD = "SDD"
STANDARDIZATION = "logit-standardization-KD"

SDD_CLIP = {"clip_grad_norm": 40.0}
"""The trainer of SDD clips gradients in all of its runs; that of mdistiller does not."""

SDD_POOLING = {"scales": "sdd"}
"""The networks of SDD pool a 4 x 4 grid first, whatever the scales are. On maps whose side 4
divides, as on CIFAR-100, this is the same as pooling each scale from the map."""

LIKE, UNLIKE = "like networks", "unlike networks"
BETA_6 = "vgg13 -> any, wrn_40_2 -> wrn_16_2, wrn_40_1 or MobileNetV2"
BETA_2 = "resnet56 -> resnet20, resnet110 -> resnet32"


def _kd() -> tuple[Published, ...]:
    standardized = {"name": "kd", "standardize": True, "temperature": 2.0, "alpha": 0.989}
    return (
        Published(CIFAR, {"name": "kd", "temperature": 4.0, "alpha": 0.9}, MDISTILLER),
        Published(
            CIFAR,
            standardized,
            STANDARDIZATION,
            note="Weights 0.1 and 9, which add up to 9.1: use 9.1 times the learning rate and, "
            "with SGD, a 9.1th of the weight decay and of any clipping norm.",
        ),
        Published(
            CIFAR,
            {"name": "dist", "temperature": 4.0, "beta": 2.0, "gamma": 2.0},
            "DIST",
        ),
        Published(
            IMAGENET, {"name": "dist", "temperature": 1.0, "beta": 2.0, "gamma": 2.0}, "DIST"
        ),
    )


def _decoupled() -> tuple[Published, ...]:
    dkd = {"name": "dkd", "temperature": 4.0, "alpha": 1.0, "beta": 8.0, "warmup_epochs": 20.0}
    at_1 = dkd | {"temperature": 1.0, "warmup_epochs": 1.0}
    standardized = dkd | {"standardize": True, "temperature": 2.0, "alpha": 9.0, "beta": 72.0}
    nkd = {"name": "nkd", "temperature": 1.0, "gamma": 1.5, "classes": "others"}
    own, sdds = nkd | {"warmup_epochs": 0.0}, nkd | {"classes": "all", "warmup_epochs": 20.0}
    return (
        Published(CIFAR, dkd, MDISTILLER),
        Published(f"{CIFAR}, {BETA_6}", dkd | {"beta": 6.0}, MDISTILLER),
        Published(f"{CIFAR}, {BETA_2}", dkd | {"beta": 2.0}, MDISTILLER),
        Published(CIFAR, standardized, STANDARDIZATION),
        Published(f"{IMAGENET}, ResNet34 -> ResNet18", at_1 | {"beta": 0.5}, MDISTILLER),
        Published(f"{IMAGENET}, ResNet50 -> MobileNetV1", at_1 | {"beta": 2.0}, MDISTILLER),
        Published(
            f"{CIFAR}, ResNet34 -> ResNet18",
            own | {"temperature": 3.0, "gamma": 3.5},
            "cls_KD (NKD)",
        ),
        Published(IMAGENET, own, "cls_KD (NKD)"),
        Published(f"{CIFAR}, the NKD columns of SDD", sdds, SDD, SDD_CLIP),
    )


def _scale_decoupled() -> tuple[Published, ...]:
    kd = {"name": "sd-kd", "temperature": 4.0, "alpha": 0.9}
    dkd = {"name": "sd-dkd", "temperature": 4.0, "alpha": 1.0, "beta": 8.0, "warmup_epochs": 20.0}
    nkd = {"name": "sd-nkd", "temperature": 4.0, "gamma": 8.0, "warmup_epochs": 20.0}
    rows = []
    for method in (kd, dkd, nkd):
        weight = {"sd-dkd": "beta", "sd-nkd": "gamma"}.get(str(method["name"]))
        for networks, scales in ((LIKE, [1, 2]), (UNLIKE, [1, 2, 4])):
            build = {"scales": scales}
            rows.append(Published(f"{CIFAR}, {networks}", method, SDD, SDD_CLIP, build))
        if weight is not None:
            for networks, value in ((BETA_6, 6.0), (BETA_2, 2.0)):
                written = method | {weight: value}
                rows.append(Published(f"{CIFAR}, {networks}", written, SDD, SDD_CLIP))
        at_1 = method if weight is None else method | {"temperature": 1.0, "warmup_epochs": 1.0}
        for networks, value, used in (
            ("ResNet34 -> ResNet18", 0.5, {"scales": [1, 2]}),
            ("ResNet50 -> MobileNetV1", 2.0, {}),
        ):
            written = at_1 | ({} if weight is None else {weight: value}) | used
            data = f"{IMAGENET}, {networks}"
            rows.append(Published(data, written, SDD, SDD_CLIP, SDD_POOLING))
    return tuple(rows)


def _several_teachers() -> tuple[Published, ...]:
    return (
        Published(
            IMAGENET,
            {"name": "soft", "temperature": 3.0, "alpha": 0.1},
            "DeiT",
            note="Its KL is averaged over the classes too: alpha weighs C times less there.",
        ),
        Published(IMAGENET, {"name": "hard", "temperature": 1.0, "alpha": 0.5}, "DeiT"),
    )


def _no_better_teacher() -> tuple[Published, ...]:
    virtual = {"form": "virtual", "temperature": 20.0, "alpha": 0.1, "correct": 0.99}
    own = {"form": "self", "temperature": 6.0, "alpha": 0.905}
    ddgsd = {"name": "ddgsd", "temperature": 1.0, "consistency": 1.0, "mmd": 0.0005}
    return (
        Published(
            f"{CIFAR}, ResNet-18",
            {"name": "tf-kd", **virtual},
            "Teacher-free-KD",
            note="Its weight is 100 / C of this one with C classes.",
        ),
        Published(
            f"{CIFAR}, ResNet-18",
            {"name": "tf-kd", **own},
            "Teacher-free-KD",
            note="0.05 CE and 0.95 x 50 / C KL: at C = 100 they add up to 0.525, so its loss is "
            "0.525 of this one.",
        ),
        Published(
            CIFAR, ddgsd, "Xu and Liu, who published no code", note="`mmd` is 1e-4 to 5e-4 there."
        ),
        Published(CIFAR, {"name": "ps-kd", "final_alpha": 0.8}, "PS-KD"),
        Published(CIFAR, {"name": "cs-kd", "temperature": 4.0, "consistency": 1.0}, "cs-kd"),
        Published(
            CIFAR, {"name": "peers", "temperature": 1.0, "weight": 1.0}, "deep mutual learning"
        ),
    )


PUBLISHED: tuple[Published, ...] = (
    *_kd(),
    *_decoupled(),
    *_scale_decoupled(),
    *_several_teachers(),
    *_no_better_teacher(),
)


def published_of(method: str) -> tuple[Published, ...]:
    """The published settings of a method, in the order of the table."""
    return tuple(row for row in PUBLISHED if row.name == method)
