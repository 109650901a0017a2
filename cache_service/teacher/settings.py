"""The `teacher:` section of a build file. Without torch, because the service reads it too."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from cache_service.config import EXPANDED, Frozen
from cache_service.format.spec import OutputIndex, without_later

Positive = Annotated[float, Field(gt=0)]

MAX_OUTPUTS = 2**24
"""Outputs of the largest network that a cache can hold."""

LATER = frozenset(
    {
        "checkpoint_key",
        "checkpoint_weights",
        "output",
        "answers",
        "classes",
        "channels",
        "feature_map",
        "classifier",
    }
)
"""Keys that caches of earlier versions do not have."""


NEVER_PASSED_ON = frozenset(
    {"output", "answers", "classes", "channels", "feature_map", "classifier"}
)
"""Keys about a network that its constructor may use as names of its own arguments."""


class ClassNames(Frozen):
    """The teacher's outputs by the names of the dataset's classes."""

    names: Annotated[
        str | tuple[str, ...] | None,
        Field(
            min_length=1,
            description="Names of all outputs in their order: a list, a file with one a line, or "
            "imagenet-1k.",
        ),
        EXPANDED,
    ] = None
    pattern: Annotated[
        str,
        Field(
            description="Form of the dataset's class names, with {name}, or with {index} for the "
            'number of the output, such as "{index}_*".'
        ),
    ] = "{name}"

    @model_validator(mode="after")
    def _check(self) -> ClassNames:
        used = [part for part in ("{index}", "{name}") if part in self.pattern]
        if len(used) != 1 or self.pattern.count(used[0]) != 1:
            raise ValueError(
                f"pattern {self.pattern!r} must contain {{index}} or {{name}}, one of them once"
            )
        if (used[0] == "{name}") != (self.names is not None):
            raise ValueError(
                "names lists the names that {name} in pattern stands for: give both, or {index}"
            )
        return self


def _check_form(value: Any, info: ValidationInfo) -> Any:
    """Says what is wrong with one of the three forms, where a union would complain of all three."""
    if isinstance(value, list | tuple) and value:
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < MAX_OUTPUTS:
                raise ValueError(f"{item!r} is not the index of an output")
        return value
    if isinstance(value, dict):
        try:
            return ClassNames.model_validate(value, context=info.context)
        except ValidationError as refused:
            first = refused.errors()[0]
            key = ".".join(map(str, first["loc"]))
            message = str(first["msg"]).removeprefix("Value error, ")
            raise ValueError(f"{key}: {message}" if key else message) from refused
    if value is None or isinstance(value, ClassNames) or (isinstance(value, str) and value):
        return value
    raise ValueError(
        f"{value!r} is no list of indices, no file, and no mapping of names and pattern"
    )


class TeacherConfig(Frozen):
    """The network whose logits are recorded, its weights and its preprocessing."""

    model: Annotated[
        str,
        Field(min_length=1, description="timm's name, torchvision/NAME or module:factory."),
        EXPANDED,
    ]
    checkpoint: Annotated[
        str | None,
        Field(min_length=1, description="Weights: .safetensors, .pt, .pth or a folder."),
        EXPANDED,
    ] = None
    checkpoint_weights: Annotated[
        Literal["raw", "averaged"] | None,
        Field(description="Which to take of a checkpoint that holds both raw and averaged (EMA)."),
    ] = None
    checkpoint_key: Annotated[
        str | None,
        Field(
            min_length=1,
            coerce_numbers_to_str=True,  # a list's item 1, as YAML reads it
            description="Which network of a checkpoint that holds several.",
        ),
    ] = None
    pretrained: Annotated[bool, Field(description="Fetch the published weights.")] = False
    num_classes: Annotated[
        int | None, Field(ge=2, description="Outputs, if not the dataset's number of classes.")
    ] = None
    input_size: Annotated[
        int | None, Field(ge=8, le=4096, description="Side fed to the network, px.")
    ] = None
    channels: Annotated[
        Literal[1, 3],
        Field(description="Of the network's input; 1: views are converted to grey."),
    ] = 3
    mean: Annotated[
        tuple[float, ...] | None, Field(description="One number per channel, 0 to 1 scale.")
    ] = None
    std: Annotated[
        tuple[Positive, ...] | None, Field(description="One number per channel, 0 to 1 scale.")
    ] = None
    interpolation: Annotated[
        Literal["bilinear", "bicubic"] | None, Field(description="For views of another size.")
    ] = None
    precision: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Field(description="Of the computation."),
    ] = "float32"
    compile: Annotated[bool, Field(description="Run through torch.compile.")] = False
    channels_last: Annotated[
        bool, Field(description="Memory format of the network, where it can run in it.")
    ] = True
    output: Annotated[
        OutputIndex | None,
        Field(description="Where the logits are in a tuple or mapping: an index or key, or mean."),
    ] = None
    answers: Annotated[
        Literal["logits", "probabilities"] | None,
        Field(description="probabilities: their logarithm is recorded. Null: logits, checked."),
    ] = None
    classes: Annotated[
        tuple[int, ...] | ClassNames | str | None,
        BeforeValidator(_check_form),
        Field(
            description="The output of each class: a list, a file with one a line, or by names.",
        ),
        EXPANDED,
    ] = None
    feature_map: Annotated[
        str | None,
        Field(min_length=1, description="Module that makes the map of the cells, if not found."),
    ] = None
    classifier: Annotated[
        str | None,
        Field(min_length=1, description="Module that is fed the map's mean, if not found."),
    ] = None
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
        for values in (self.mean, self.std):
            if values is not None and len(values) != self.channels:
                raise ValueError(
                    f"teacher.mean and teacher.std have {len(values)} numbers, and "
                    f"teacher.channels is {self.channels}: give one number per channel"
                )
        own = {"name", *type(self).model_fields} - NEVER_PASSED_ON
        taken = sorted(self.model_args.keys() & own)
        if taken:
            raise ValueError(
                f"model_args cannot hold {taken[0]}: the section has a key of its own for it"
            )
        if self.pretrained and self.checkpoint is not None:
            raise ValueError("teacher.pretrained and teacher.checkpoint both name its weights")
        for key in ("checkpoint_weights", "checkpoint_key"):
            if getattr(self, key) is not None and self.checkpoint is None:
                raise ValueError(f"teacher.{key} chooses within teacher.checkpoint: give it")
        return self

    @model_serializer(mode="wrap")
    def _without_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Caches store this section. Without defaults of later keys, old and new caches stay equal.
        return without_later(self, serialize(self), LATER)
