"""Declared augmentation: the settings of each op, the presets, and the recipe. No I/O.

`cache_service.views` applies the ops; this file holds their settings. A recipe is stored in the
cache, so every default below is part of the format: changing one makes a build of the same file
another cache. Sizes are in pixels, areas are fractions of the image.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cache_service.config import EXPANDED, Frozen

Probability = Annotated[float, Field(ge=0, le=1, description="Probability.")]
Aspect = Annotated[float, Field(ge=0.01, le=100, description="Width / height.")]
Interpolation = Annotated[
    Literal["bilinear", "bicubic"], Field(description="Of the resize; both antialiased.")
]
Part = Annotated[float, Field(gt=0, le=1)]
AreaRange = Annotated[
    tuple[Part, Part], Field(description="Smallest and largest fraction of the image's area.")
]
AspectRange = Annotated[
    tuple[Aspect, Aspect], Field(description="Smallest and largest width / height.")
]
Scale = Annotated[float, Field(ge=0.1, le=10)]
Strength = Annotated[float, Field(ge=0, le=1, description="Factors from 1 - this to 1 + this.")]
Alpha = Annotated[float, Field(gt=0, le=32, description="Of Beta(alpha, alpha).")]
Repeats = Annotated[
    int,
    Field(
        ge=1,
        le=64,
        description="Views of each visited image per seed; a seed visits one image in this many.",
    ),
]


class _Op(Frozen):
    @model_validator(mode="after")
    def _check_ranges(self) -> _Op:
        for name, value in self:
            if isinstance(value, tuple) and value[0] > value[1]:
                op = getattr(self, "op", "")
                raise ValueError(f"{op}.{name} runs from {value[0]} down to {value[1]}")
        return self


class PadCrop(_Op):
    """Pad by `padding` on each side, then crop the view's size at a random place."""

    op: Literal["pad_crop"] = "pad_crop"
    padding: Annotated[int, Field(ge=0, le=1024, description="px")] = 4
    mode: Annotated[
        Literal["constant", "reflect"], Field(description="Black, or the mirrored border.")
    ] = "constant"


class RandomResizedCrop(_Op):
    """Crop a random area and aspect ratio, then resize it to the view's size."""

    op: Literal["random_resized_crop"] = "random_resized_crop"
    area: AreaRange = (0.08, 1.0)
    ratio: AspectRange = (0.75, 4 / 3)
    interpolation: Interpolation = "bilinear"


class CenterCrop(_Op):
    """Resize the shorter side to size / crop_pct, then crop the middle. Draws nothing."""

    op: Literal["center_crop"] = "center_crop"
    crop_pct: Annotated[
        float,
        Field(ge=0.1, le=1, description="The view's side / the resized shorter side."),
    ] = 1.0
    interpolation: Interpolation = "bilinear"


class HorizontalFlip(_Op):
    """Mirror left and right with probability `prob`."""

    op: Literal["horizontal_flip"] = "horizontal_flip"
    prob: Probability = 0.5


class RandomAffine(_Op):
    """Rotate, translate, scale and shear about the center; bilinear, on black."""

    op: Literal["random_affine"] = "random_affine"
    degrees: Annotated[
        float, Field(ge=0, le=180, description="Rotates by at most this, either way.")
    ] = 10.0
    translate: Annotated[
        float, Field(ge=0, le=1, description="Translates by at most this fraction of the side.")
    ] = 0.0
    scale: Annotated[tuple[Scale, Scale], Field(description="Smallest and largest.")] = (
        1.0,
        1.0,
    )
    shear: Annotated[
        float, Field(ge=0, le=60, description="Shears by at most this, in degrees, either way.")
    ] = 0.0


class ColorJitter(_Op):
    """Brightness, contrast, saturation and hue, in a random order, with probability `prob`."""

    op: Literal["color_jitter"] = "color_jitter"
    brightness: Strength = 0.0
    contrast: Strength = 0.0
    saturation: Strength = 0.0
    hue: Annotated[
        float,
        Field(ge=0, le=0.5, description="Rotates by this fraction of the color circle."),
    ] = 0.0
    prob: Probability = 1.0


class RandAugment(_Op):
    """`num_ops` random ops of one magnitude (Cubuk et al., 2020)."""

    op: Literal["rand_augment"] = "rand_augment"
    num_ops: Annotated[int, Field(ge=1, le=8, description="Ops applied to a view.")] = 2
    magnitude: Annotated[int, Field(ge=0, le=30, description="Of 31 levels, 0 to 30.")] = 9


class TrivialAugment(_Op):
    """One random op of a random magnitude, wide ranges (Mueller and Hutter, 2021)."""

    op: Literal["trivial_augment"] = "trivial_augment"


class RandomErasing(_Op):
    """Overwrite a random box with the mean color or with noise (Zhong et al., 2020)."""

    op: Literal["random_erasing"] = "random_erasing"
    prob: Probability = 0.25
    area: AreaRange = (0.02, 1 / 3)
    ratio: AspectRange = (0.3, 10 / 3)
    fill: Annotated[
        Literal["mean", "noise"], Field(description="ImageNet's mean color, or uniform noise.")
    ] = "mean"


class Mixup(_Op):
    """Blend with the neighbor in the seed's order, weight ~ Beta(alpha, alpha)."""

    op: Literal["mixup"] = "mixup"
    alpha: Alpha = 0.8
    prob: Probability = 1.0


class Cutmix(_Op):
    """Paste a box of the neighbor in the seed's order, its area ~ Beta(alpha, alpha)."""

    op: Literal["cutmix"] = "cutmix"
    alpha: Alpha = 1.0
    prob: Probability = 1.0


Op = Annotated[
    PadCrop
    | RandomResizedCrop
    | CenterCrop
    | HorizontalFlip
    | RandomAffine
    | ColorJitter
    | RandAugment
    | TrivialAugment
    | RandomErasing
    | Mixup
    | Cutmix,
    Field(discriminator="op"),
]

FRAMING = (PadCrop, RandomResizedCrop, CenterCrop)
"""Ops that turn an image of any size into a square of the view's size. A recipe starts with one."""

MIXING = (Mixup, Cutmix)
"""Ops that need a partner. They come last; with both, each pair draws one of them."""

PRESETS: dict[str, tuple[Op, ...]] = {
    "cifar": (PadCrop(padding=4), HorizontalFlip()),
    "imagenet": (RandomResizedCrop(), HorizontalFlip()),
    "deit": (
        RandomResizedCrop(interpolation="bicubic"),
        HorizontalFlip(),
        RandAugment(num_ops=2, magnitude=9),
        RandomErasing(prob=0.25, fill="noise"),
        Mixup(alpha=0.8),
        Cutmix(alpha=1.0),
    ),
    "none": (CenterCrop(),),
}


class Recipe(Frozen):
    """What is done to an image to make a view, in full: presets are expanded before this."""

    version: Literal[1] = 1
    size: Annotated[int, Field(ge=8, le=4096, description="Side of the square view, px.")]
    ops: tuple[Op, ...] = ()
    callable: str | None = None
    repeats: Repeats = 1

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Recipes of caches from before this key have no `repeats`: without it, they stay equal.
        document: dict[str, Any] = serialize(self)
        return {name: v for name, v in document.items() if name != "repeats" or v != 1}

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.callable is not None:
            if self.ops:
                raise ValueError("augment takes `ops` or `callable`, not both")
            return self
        if not self.ops or not isinstance(self.ops[0], FRAMING):
            raise ValueError(
                "augment.ops must start with pad_crop, random_resized_crop or center_crop: "
                "the first op makes the view's size out of an image of any size"
            )
        for before, after in zip(self.ops, self.ops[1:], strict=False):
            if isinstance(after, FRAMING):
                raise ValueError(f"augment.ops has a second framing op, {after.op}")
            if isinstance(before, MIXING) and not isinstance(after, MIXING):
                raise ValueError(f"augment.ops has {after.op} after {before.op}: mixing is last")
        kinds = [op.op for op in self.ops if isinstance(op, MIXING)]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"augment.ops names {kinds[0]} twice")
        return self

    @property
    def mixing(self) -> tuple[Mixup | Cutmix, ...]:
        """The mixing ops, in the recipe's order; empty where every view has one sample."""
        return tuple(op for op in self.ops if isinstance(op, MIXING))


class AugmentConfig(Frozen):
    """`augment:` of a build file: a preset, a list of ops, or a callable of the user's own."""

    size: Annotated[int, Field(ge=8, le=4096, description="Side of the square view, px.")]
    preset: Annotated[
        Literal["cifar", "imagenet", "deit", "none"] | None, Field(description="A list of ops.")
    ] = None
    ops: Annotated[
        tuple[Op, ...] | None, Field(description="In order; the first one makes the view's size.")
    ] = None
    callable: Annotated[
        str | None,
        Field(pattern=r"^[^:]+:[^:]+$", description="Your own pipeline, as module:factory."),
        EXPANDED,
    ] = None
    repeats: Repeats = 1

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        given = [n for n in ("preset", "ops", "callable") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                f"augment takes one of preset, ops, callable; got {' and '.join(given) or 'none'}"
            )
        self.recipe()
        return self

    def recipe(self) -> Recipe:
        """The recipe in full: equal recipes are equal however they were written."""
        if self.callable is not None:
            return Recipe(size=self.size, callable=self.callable, repeats=self.repeats)
        ops: Any = PRESETS[self.preset] if self.preset is not None else self.ops
        return Recipe(size=self.size, ops=ops, repeats=self.repeats)
