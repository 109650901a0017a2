"""Settings of the scale decoupled tables: what the paper's code fixes, and the quick form."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cache_service.format.frozen import Frozen
from cache_service.format.spec import Codec, Int8Codec
from cli.experiments.reproduce.school import Count, Document, ImageSettings, TrainingSettings
from cli.experiments.reproduce.sdd_pairs import Pair
from distill.optim import SGD
from distill.schedule import MultiStep

FORMS = {"kd": "sd-kd", "dkd": "sd-dkd", "nkd": "sd-nkd"}
"""Each method and its scale decoupled form."""

METHODS = ("ce", *FORMS, *FORMS.values())


class SddSettings(Frozen):
    """Everything that the paper's code fixes; recording is this project's."""

    images: ImageSettings = ImageSettings()
    training: TrainingSettings = TrainingSettings()
    light_lr: Annotated[float, Field(gt=0, description="Of ShuffleNet and MobileNet students.")] = (
        0.01
    )
    temperature: Annotated[float, Field(gt=0)] = 4.0
    warmup_epochs: Annotated[float, Field(ge=0, description="Of DKD, NKD and their forms.")] = 20.0
    teacher_epochs: Annotated[int | None, Field(ge=1, description="Null: as a student.")] = None
    recorded: Annotated[Count, Field(description="Recorded epochs, used in turn.")] = 240
    codec: Codec = Int8Codec()

    @property
    def teaching(self) -> TrainingSettings:
        """How the teacher is trained."""
        return self.training.model_copy(
            update={"epochs": self.teacher_epochs or self.training.epochs}
        )


FULL = SddSettings(images=ImageSettings(workers=8))
"""For a GPU: every epoch of a student is a recorded epoch of its own."""

QUICK = SddSettings(
    images=ImageSettings(num_classes=20, shrink=2),
    training=TrainingSettings(
        optimizer=SGD(lr=0.05, weight_decay=5e-4),
        schedule=MultiStep(milestones=(8, 10, 11)),
        epochs=12,
    ),
    warmup_epochs=1.0,
    recorded=12,
)
"""Sized for ten minutes on two cores: 20 classes at 16 px, a twentieth of the epochs."""


def method_document(method: str, settings: SddSettings, pair: Pair) -> Document:
    """`method:` of a student's train file, as the published figures were made."""
    base, *_ = [name for name, form in FORMS.items() if method in {name, form}] or ["ce"]
    document: Document = {"name": method}
    if base == "kd":
        document |= {"temperature": settings.temperature, "alpha": 0.9}
    if base == "dkd":
        document |= {"temperature": settings.temperature, "alpha": 1.0, "beta": pair.beta}
    if base == "nkd":
        # Plain NKD was run at T = 1 and gamma 1.5, its form with the T and the beta of DKD.
        is_plain = method == base
        document |= {
            "temperature": 1.0 if is_plain else settings.temperature,
            "gamma": 1.5 if is_plain else pair.beta,
            "classes": "all",
        }
    if base in {"dkd", "nkd"}:
        document["warmup_epochs"] = settings.warmup_epochs
    if method.startswith("sd-"):
        document["scales"] = list(pair.scales)
    return document
