"""Everything that identifies a cache, and the fingerprint over it. No I/O, no torch.

Identity only: where a cache lies, which seeds are recorded so far, and how it was built (batch
size, workers, device) are not here, because two caches that differ in those are interchangeable.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from cache_service.config import Frozen
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.cells import choose_stored_scales, num_cells
from cache_service.format.codecs import ArrayMath, Arrays, Codec, Decoding, Floats, Head
from cache_service.format.recipe import Recipe

FORMAT_VERSION: Literal[1] = 1
"""Raised when an older reader would misread a newer cache. A reader refuses any other number."""

LATER_OF_TEACHER = frozenset({"classes", "output", "answers", "feature_map"})
"""Keys of `teacher` that caches of earlier versions do not have."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Scales = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)]
NumClasses = Annotated[int, Field(ge=2, le=2**24)]


def _index_or_key(value: Any) -> Any:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int | str) or number == "":
        raise ValueError(f"{value!r} is no index, key or attribute of what the network returns")
    if isinstance(number, int) and not 0 <= number < 64:
        raise ValueError(f"{value} is not an index from 0 to 63")
    return number


OutputIndex = Annotated[int | str, BeforeValidator(_index_or_key)]
"""Where the logits are in what a network returns."""


def without_later(
    model: BaseModel, document: dict[str, Any], later: Collection[str]
) -> dict[str, Any]:
    """A serialized model without those of its later keys that have their default.

    Documents that identify a cache must not change when a key is added.
    """
    fields = type(model).model_fields
    return {
        name: value
        for name, value in document.items()
        if name not in later or getattr(model, name) != fields[name].default
    }


class Preprocess(Frozen):
    """What happens to a uint8 view before a network sees it.

    `mean` and `std` have a number for each of three channels. With one number each, the view is
    converted to grey, one channel, as Pillow does: (19595 R + 38470 G + 7471 B + 32768) // 65536.
    """

    size: Annotated[int, Field(ge=8, le=4096, description="Side fed to the network, px.")]
    mean: tuple[float, ...]
    std: Annotated[
        tuple[Annotated[float, Field(gt=0)], ...],
        Field(description="Per channel, on the 0 to 1 scale."),
    ]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"

    @model_validator(mode="after")
    def _check(self) -> Preprocess:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise ValueError(
                f"mean has {len(self.mean)} numbers and std {len(self.std)}: both have 3, or 1 for "
                "grey input"
            )
        return self

    @property
    def channels(self) -> int:
        """Channels of the network's input: 3, or 1 for grey."""
        return len(self.mean)


class DatasetId(Frozen):
    """Which images and labels: independent of where they lie."""

    name: str
    split: str
    num_samples: Annotated[int, Field(ge=1, le=2**31 - 1)]
    num_classes: NumClasses
    sha256: Sha256


class TeacherId(Frozen):
    """Which network answered, and on which input.

    Attributes:
        num_classes: of the recorded logits.
        classes: the output of each recorded class, where not all outputs are recorded in order.
        output: which part of what the network returns has the logits, where it was chosen.
        answers: probabilities where the logarithm of the network's answer is recorded.
        feature_map: module that makes the map of the cells, where it was chosen.
    """

    model: str
    weights_sha256: Sha256
    num_classes: NumClasses
    preprocess: Preprocess
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    map_side: Annotated[int, Field(ge=1)] | None = None
    affine_head: bool = False
    pooling: Literal["direct", "chained"] = "direct"
    classes: tuple[Annotated[int, Field(ge=0, lt=2**24)], ...] | None = None
    output: OutputIndex | None = None
    answers: Literal["logits", "probabilities"] = "logits"
    feature_map: str | None = None

    @model_validator(mode="after")
    def _check(self) -> TeacherId:
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(
                f"classes names {len(self.classes)} outputs for num_classes={self.num_classes}"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_later(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_later(self, serialize(self), LATER_OF_TEACHER)


class Layout(Frozen):
    """How positions are grouped. A shard is written, committed and lost as one."""

    shard_rows: Annotated[
        int, Field(ge=2, le=2**20, description="Views per unit of work and commit; even.")
    ]
    chunk_rows: Annotated[
        int, Field(ge=1, le=2**20, description="Views per checksum; divides shard_rows.")
    ]

    @model_validator(mode="after")
    def _check(self) -> Layout:
        if self.shard_rows % 2:
            raise ValueError(
                f"layout.shard_rows={self.shard_rows} must be even: mixing partners are the "
                "neighbors 2k and 2k+1, and a shard never separates them"
            )
        if self.shard_rows % self.chunk_rows:
            raise ValueError(
                f"layout.chunk_rows={self.chunk_rows} must divide "
                f"layout.shard_rows={self.shard_rows}"
            )
        return self


class CacheSpec(Frozen):
    """Identity of one cache: dataset x recipe x teacher x scales x codec."""

    format: Literal[1] = FORMAT_VERSION
    dataset: DatasetId
    recipe: Recipe
    teacher: TeacherId
    scales: Scales = (1,)
    stored_scales: Scales = (1,)
    codec: Codec
    layout: Layout

    @model_validator(mode="after")
    def _check(self) -> CacheSpec:
        if self.scales[0] != 1 or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(
                f"scales must start at 1 and strictly increase, got {list(self.scales)}: cell 0 "
                "is the whole image, and every SDD weight is decided against it"
            )
        finest = choose_stored_scales(
            self.scales,
            map_side=self.teacher.map_side,
            affine_head=self.teacher.affine_head,
            chained=self.teacher.pooling == "chained",
        )
        if self.stored_scales not in (self.scales, finest):
            raise ValueError(
                f"stored_scales={list(self.stored_scales)} must be all scales, or the finest one "
                "where the others follow from it (an affine head, and sides that divide it)"
            )
        self.codec.check(self.teacher.num_classes)
        if self.dataset.num_classes > self.teacher.num_classes:
            raise ValueError(
                f"the dataset has {self.dataset.num_classes} classes, "
                f"the teacher only {self.teacher.num_classes}"
            )
        if self.codec.drops_classes and self.stored_scales != self.scales:
            raise ValueError("topk keeps other classes in every cell, so it must store all scales")
        return self

    def decode(self, rows: Arrays, *, head: Head | None, temperature: float = 1.0) -> Floats:
        """Logits of the stored cells, float32 [B, R, C].

        Args:
            rows: arrays of a cache of this spec.
            head: of that cache; None unless its codec stores features.
            temperature: see `codecs.Decoding`.
        """
        how = Decoding(ArrayMath(), self.teacher.num_classes, temperature)
        cells_BRX: Floats = self.codec.decode(rows, how)
        if not self.codec.stores_features:
            return cells_BRX
        assert head is not None
        return cells_BRX @ head.weight_CD.T + head.bias_C

    @property
    def num_stored_cells(self) -> int:
        """Cells stored per view; fewer than `num_cells` where coarser ones follow from them."""
        return num_cells(self.stored_scales)

    @property
    def num_cells(self) -> int:
        """Cells per view over all scales: (1, 2, 4) -> 1 + 4 + 16 = 21."""
        return num_cells(self.scales)

    @property
    def num_shards(self) -> int:
        """Shards per seed."""
        return -(-self.dataset.num_samples // self.layout.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Positions [start, stop) of a shard; the last one may be shorter."""
        start = shard * self.layout.shard_rows
        return start, min(start + self.layout.shard_rows, self.dataset.num_samples)

    @property
    def fingerprint(self) -> str:
        """sha256 over the canonical JSON: two caches with one fingerprint are interchangeable."""
        return sha256_hex(canonical_json(self.model_dump(mode="json")))
