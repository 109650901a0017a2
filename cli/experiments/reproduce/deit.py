"""Settings and files of the table of CNN and DeiT teachers on CIFAR-100."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cache_service.format.frozen import Frozen
from cache_service.format.spec import Codec, DenseCodec
from cli.experiments.reproduce.school import (
    Count,
    Document,
    ImageSettings,
    TrainingSettings,
    network,
)
from cli.experiments.reproduce.small_nets import RESNET
from distill.optim import SGD, AdamW
from distill.schedule import Cosine

TOKENS = "distill.tokens:vit_tokens"

Kind = Literal["soft", "hard"]
KINDS: tuple[Kind, ...] = ("soft", "hard")


class DeitSettings(Frozen):
    """Networks, lengths and rates. The study gives the networks and that they are fine-tuned; what
    DeiT's own paper says of its losses is taken from there, the rest is this project's."""

    images: ImageSettings = ImageSettings(preset="imagenet", view_size=224, workers=12)
    cnn: Document = Field(default_factory=lambda: {"model": "resnet50", "pretrained": True})
    vit: Document = Field(
        default_factory=lambda: {"model": "deit_small_patch16_224", "pretrained": True}
    )
    cnn_training: TrainingSettings = TrainingSettings(
        optimizer=SGD(lr=0.01, weight_decay=1e-4),
        schedule=Cosine(warmup_epochs=1),
        epochs=30,
        clip_grad_norm=None,
        amp="bfloat16",
    )
    vit_training: TrainingSettings = TrainingSettings(
        optimizer=AdamW(lr=5e-5, weight_decay=0.05),
        schedule=Cosine(warmup_epochs=1),
        epochs=30,
        clip_grad_norm=1.0,
        amp="bfloat16",
    )
    soft_temperature: Annotated[float, Field(gt=0)] = 3.0
    soft_alpha: Annotated[float, Field(ge=0, le=1)] = 0.1
    hard_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    recorded: Annotated[Count, Field(description="Recorded epochs, used in turn.")] = 30
    codec: Codec = DenseCodec()

    def method(self, kind: Kind) -> Document:
        """`method:` of a train file."""
        if kind == "soft":
            weights = {"temperature": self.soft_temperature, "alpha": self.soft_alpha}
            return {"name": "soft", **weights}
        return {"name": "hard", "alpha": self.hard_alpha}

    def student(self, num_tokens: int) -> Document:
        """`student:` of a train file: the vision transformer with distillation tokens."""
        args = {**self.vit.get("model_args", {}), "backbone": self.vit["model"]}
        return {**self.vit, "model": TOKENS, "model_args": {**args, "num_tokens": num_tokens}}


FULL = DeitSettings()
"""For a GPU, with weights of ImageNet from the network."""

QUICK = DeitSettings(
    images=ImageSettings(num_classes=20, per_class=200, shrink=2),
    cnn=network(RESNET, depth=8, widths=[16, 16, 32, 64]),
    vit=network(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=48, depth=3, num_heads=3
    ),
    cnn_training=TrainingSettings(
        optimizer=SGD(lr=0.05, weight_decay=5e-4), schedule=Cosine(), epochs=12
    ),
    vit_training=TrainingSettings(
        optimizer=AdamW(lr=0.001, weight_decay=0.05),
        schedule=Cosine(warmup_epochs=1),
        epochs=12,
        clip_grad_norm=1.0,
    ),
    recorded=4,
)
"""Sized for ten minutes on two cores: tiny networks from scratch, 20 classes at 16 px."""
