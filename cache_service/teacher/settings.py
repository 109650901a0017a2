"""The `teacher:` section of a build file. Without torch, because the service reads it too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cache_service.config import EXPANDED, Frozen

Positive = Annotated[float, Field(gt=0)]


class TeacherConfig(Frozen):
    """The network whose logits are recorded, its weights and its preprocessing."""

    model: Annotated[
        str,
        Field(min_length=1, description="timm's name, torchvision/NAME or module:factory."),
        EXPANDED,
    ]
    checkpoint: Annotated[
        str | None,
        Field(min_length=1, description=".safetensors, .pt or .pth of weights."),
        EXPANDED,
    ] = None
    checkpoint_weights: Annotated[
        Literal["raw", "averaged"] | None,
        Field(description="Which to take of a checkpoint that holds both raw and averaged (EMA)."),
    ] = None
    pretrained: Annotated[bool, Field(description="Fetch the published weights.")] = False
    num_classes: Annotated[
        int | None, Field(ge=2, description="Outputs, if not the dataset's number of classes.")
    ] = None
    input_size: Annotated[
        int | None, Field(ge=8, le=4096, description="Side fed to the network, px.")
    ] = None
    mean: Annotated[
        tuple[float, float, float] | None, Field(description="Per channel, 0 to 1 scale.")
    ] = None
    std: Annotated[
        tuple[Positive, Positive, Positive] | None, Field(description="Per channel, 0 to 1 scale.")
    ] = None
    interpolation: Annotated[
        Literal["bilinear", "bicubic"] | None, Field(description="For views of another size.")
    ] = None
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Field(description="Of the computation."),
    ] = "float32"
    compile: Annotated[bool, Field(description="Run through torch.compile.")] = False
    channels_last: Annotated[bool, Field(description="Memory format of the network.")] = True
    allow_untrained: Annotated[
        bool, Field(description="Record a teacher even if it is no better than chance, for tests.")
    ] = False
    seed: Annotated[int | None, Field(ge=0, lt=2**63, description="Seed of random weights.")] = None
    pooling: Annotated[
        Literal["direct", "chained"],
        Field(
            description="direct: each scale from the map; chained: the finest, and others from it."
        ),
    ] = "direct"
    model_args: dict[str, Any] = Field(
        default_factory=dict, description="Further arguments of the model's constructor."
    )

    @model_validator(mode="after")
    def _check(self) -> TeacherConfig:
        if (self.mean is None) != (self.std is None):
            raise ValueError("teacher.mean and teacher.std go together: give both or neither")
        taken = sorted(self.model_args.keys() & {"name", *type(self).model_fields})
        if taken:
            raise ValueError(
                f"model_args cannot hold {taken[0]}: the section has a key of its own for it"
            )
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("teacher.pretrained and teacher.checkpoint both name its weights")
        if self.checkpoint_weights is not None and self.checkpoint is None:
            raise ValueError(
                "teacher.checkpoint_weights chooses within teacher.checkpoint: give it"
            )
        return self
