"""Everything that identifies a cache, and the fingerprint over it. No I/O, no torch.

Identity only: where a cache lies, which seeds are recorded so far, and how it was built (batch
size, workers, device) are not here, because two caches that differ in those are interchangeable.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cache_service.config import Frozen
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.cells import choose_stored_scales, num_cells
from cache_service.format.codecs import ArrayMath, Arrays, Codec, Decoding, Floats, Head
from cache_service.format.recipe import Recipe

FORMAT_VERSION: Literal[1] = 1
"""Raised when an older reader would misread a newer cache. A reader refuses any other number."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Scales = Annotated[tuple[Annotated[int, Field(ge=1, le=64)], ...], Field(min_length=1)]
NumClasses = Annotated[int, Field(ge=2, le=2**24)]


class Preprocess(Frozen):
    """What happens to a uint8 view before a network sees it."""

    size: Annotated[int, Field(ge=8, le=4096, description="Side fed to the network, px.")]
    mean: tuple[float, float, float]
    std: Annotated[
        tuple[
            Annotated[float, Field(gt=0)],
            Annotated[float, Field(gt=0)],
            Annotated[float, Field(gt=0)],
        ],
        Field(description="Per channel, on the 0 to 1 scale."),
    ]
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


class DatasetId(Frozen):
    """Which images and labels: independent of where they lie."""

    name: str
    split: str
    num_samples: Annotated[int, Field(ge=1, le=2**31 - 1)]
    num_classes: NumClasses
    sha256: Sha256


class TeacherId(Frozen):
    """Which network answered, and on which input."""

    model: str
    weights_sha256: Sha256
    num_classes: NumClasses
    preprocess: Preprocess
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    map_side: Annotated[int, Field(ge=1)] | None = None
    affine_head: bool = False
    pooling: Literal["direct", "chained"] = "direct"


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
