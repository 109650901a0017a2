"""How a teacher's answers become stored arrays and logits again. No I/O, no torch.

There is one class per codec. It holds the codec's settings, lists its arrays, refuses what it
cannot hold, encodes and decodes. Code outside of this file asks a codec, not for its kind.

Shape letters: B batch, R stored cells, C classes, K kept classes, D channels, L labels, X either
classes or channels.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from cache_service.config import Frozen
from cache_service.errors import NonFiniteError
from cache_service.format.topk import TopRows, summarize_rows

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]

FLOAT16_MAX = 65504.0
"""Largest finite float16. A logit beyond it is refused: stored, it would read as infinity."""

NAN = float("nan")

TAIL = ("tail_mean", "tail_var", "tail_max", "tail_lme")
"""Moments of the logits that `topk` drops."""

CLASS_BLOCK = 256
"""Classes of a block: within one, a packed class is a byte."""


class RowArray(NamedTuple):
    """One array with a row per (seed, position)."""

    name: str
    dtype: str
    row_shape: tuple[int, ...]
    row_dims: tuple[str, ...]
    fill: float | int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, uncompressed."""
        return math.prod(self.row_shape) * _item_bytes(self.dtype)


@lru_cache(maxsize=16)  # numpy takes a microsecond to parse a name, and requests ask often
def _item_bytes(dtype: str) -> int:
    return np.dtype(dtype).itemsize


class Head(NamedTuple):
    """A linear classifier: logits = features @ weight_CD.T + bias_C, both float32."""

    weight_CD: Floats
    bias_C: Floats


class ArrayMath:
    """The two operations that numpy and torch spell differently, in numpy.

    Decoding runs the same formulas on torch where students train: `distill.targets.TorchMath`.
    """

    def float32(self, values: Any) -> Any:
        """The values as float32."""
        return values.astype(np.float32)

    def scatter(self, fill: Any, width: int, index: Any, values: Any) -> Any:
        """A new array [..., width] of `fill` [...], `values` put at `index` of the last axis."""
        dense = np.broadcast_to(fill[..., None], (*fill.shape, width)).astype(np.float32)
        np.put_along_axis(dense, index.astype(np.int64), values.astype(np.float32), axis=-1)
        return dense


class Decoding(NamedTuple):
    """How rows are decoded.

    Attributes:
        array_math: operations on the arrays of the rows.
        num_classes: of the teacher.
        temperature: at which the logits will be used. It matters where a codec drops classes: a
            dropped class gets the value that gives the dropped ones together the right weight in
            a softmax at that temperature.
    """

    array_math: ArrayMath
    num_classes: int
    temperature: float


class BaseCodec(Frozen):
    """Stores one array of float16, and is the interface of all codecs.

    Attributes:
        stores_features: whether the inputs of a linear head are stored in place of logits.
        num_kept: classes whose single logits are stored per cell; None where all are.
        rounding_error: root-mean-square error of the stored logits beyond that of float16, as a
            fraction of their standard deviation over the classes of a cell, at most.
    """

    stores_features: ClassVar[bool] = False
    rounding_error: ClassVar[float] = 0.0
    num_kept: ClassVar[int | None] = None
    array_name: ClassVar[str] = "logits"
    label: ClassVar[str]
    """What is stored, in a word or two; settings in braces."""

    compression: Annotated[
        Literal["none", "zstd"],
        Field(description="Of each chunk. `none` lets local readers map the file."),
    ] = "none"

    @property
    def drops_classes(self) -> bool:
        """Whether the logits of some classes are stored in summary only."""
        return self.num_kept is not None

    def describe(self) -> str:
        """What is stored, and the compression where there is one: `topk 32, zstd`."""
        text = self.label.format(**self.model_dump())
        return text if self.compression == "none" else f"{text}, {self.compression}"

    def check(self, num_classes: int) -> None:
        """Raise ValueError where the settings do not fit a teacher of so many classes."""

    def with_channels(self, num_channels: int) -> BaseCodec:  # noqa: ARG002  for one codec
        """The codec for a head of so many inputs."""
        return self

    def head_shapes(self, num_classes: int) -> dict[str, tuple[int, ...]]:  # noqa: ARG002
        """Shapes of the constant float32 arrays that decoding needs, by name."""
        return {}

    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:
        """The arrays that hold `num_cells` stored cells of each view."""
        shape = (num_cells, num_classes)
        return (RowArray(self.array_name, "float16", shape, ("cell", "class"), NAN),)

    def encode(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:
        """Arrays to store for one batch of answers.

        Args:
            answer_BRX: float32 logits [B, R, C], or the head's inputs [B, R, D] where
                `stores_features`.
            labels_BL: the classes whose logits must survive exactly: the sample's label and, in a
                mixed view, the partner's (repeat the own label where there is none).

        Raises:
            NonFiniteError: NaN, infinity, or a magnitude that float16 cannot hold.
        """
        _refuse_non_finite(answer_BRX)
        return self._encode(answer_BRX, labels_BL)

    def _encode(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:  # noqa: ARG002
        return {self.array_name: answer_BRX.astype(np.float16)}

    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """The stored cells of rows, float32 [B, R, X]: logits, or features to apply the head to."""
        return how.array_math.float32(rows[self.array_name])

    def kept_logits(self, rows: Arrays, logits_BRC: Floats) -> Floats:  # noqa: ARG002
        """Those of the logits whose single values the rows hold, [B, R, C] or [B, R, K]."""
        return logits_BRC


class DenseCodec(BaseCodec):
    """Every logit as float16: 2 bytes a class."""

    label: ClassVar[str] = "dense float16"

    kind: Literal["dense"] = "dense"


class Int8Codec(BaseCodec):
    """Every logit as uint8 with a scale and an offset per cell: 1 byte a class + 8."""

    label: ClassVar[str] = "int8"
    rounding_error: ClassVar[float] = 0.03

    kind: Literal["int8"] = "int8"

    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:
        """Levels, and what they are multiplied by and added to."""
        return _level_arrays("logits", num_cells, num_classes, "class")

    def _encode(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:  # noqa: ARG002
        return _encode_levels("logits", answer_BRX)

    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """Logits, each within half a level of what was encoded."""
        return _decode_levels("logits", rows, how)


class TopKCodec(BaseCodec):
    """The k largest logits, the label's among them, and the moments of the rest."""

    label: ClassVar[str] = "topk {k}"

    kind: Literal["topk"] = "topk"
    k: Annotated[int, Field(ge=3, description="Classes kept per cell, labels included.")]
    packed: Annotated[
        bool,
        Field(
            description="Store a kept class in 2 bytes instead of 4, its logit in 8 bits, and the "
            "moments in 12 bytes instead of 16. For `k` up to 255."
        ),
    ] = False

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The document identifies caches that were recorded before any were packed.
        document: dict[str, Any] = serialize(self)
        return {key: value for key, value in document.items() if (key, value) != ("packed", False)}

    @property
    def num_kept(self) -> int:  # type: ignore[override]
        """`k`."""
        return self.k

    @property
    def rounding_error(self) -> float:  # type: ignore[override]
        """Of the kept logits, whose levels are a 255th of their range."""
        return 0.03 if self.packed else 0.0

    def describe(self) -> str:
        """As of all codecs, and whether rows are packed."""
        return super().describe() + (" packed" if self.packed else "")

    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:
        """Kept classes with their values, and the moments of the others."""
        kept, cells = ((num_cells, self.k), ("cell", "rank")), ((num_cells,), ("cell",))
        if not self.packed:
            return (
                RowArray("classes", class_dtype(num_classes).name, *kept, 0),
                RowArray("values", "float16", *kept, NAN),
                *(RowArray(name, "float32", *cells, NAN) for name in TAIL),
            )
        blocks = ((num_cells, -(-num_classes // CLASS_BLOCK)), ("cell", "block"))
        return (
            RowArray("classes", "uint8", *kept, 0),
            RowArray("block_counts", "uint8", *blocks, 0),
            RowArray("values", "uint8", *kept, 0),
            *(RowArray(name, "float16", *cells, NAN) for name in ("low", "high", *TAIL)),
        )

    def check(self, num_classes: int) -> None:
        """Raise ValueError where nothing would be dropped, or a count needs more than a byte."""
        if self.k >= num_classes:
            raise ValueError(
                f"codec.k={self.k} is not below num_classes={num_classes}; "
                "use `codec: {kind: dense}` to keep every class"
            )
        if self.packed and self.k >= CLASS_BLOCK:
            raise ValueError(
                f"codec.k={self.k} is too large for codec.packed, which counts up to "
                f"{CLASS_BLOCK - 1} classes in a byte; leave codec.packed out"
            )

    def _encode(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:
        cells, num_classes = answer_BRX.shape[:2], answer_BRX.shape[2]
        labels_BRL = np.broadcast_to(labels_BL[:, None, :], (*cells, labels_BL.shape[-1]))
        top = summarize_rows(
            answer_BRX.reshape(-1, num_classes), labels_BRL.reshape(-1, labels_BL.shape[-1]), self.k
        )
        moments = dict(zip(TAIL, (top.mean_N, top.var_N, top.max_N, top.lme_N), strict=True))
        if self.packed:
            rows = _pack_top(top, moments, num_classes)
        else:
            rows = {
                "classes": top.kept_NK.astype(class_dtype(num_classes)),
                "values": top.values_NK.astype(np.float16),
                **moments,
            }
        return {name: values.reshape(*cells, *values.shape[1:]) for name, values in rows.items()}

    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """Dense logits whose softmax at the temperature T gives the dropped classes their weight.

        Each dropped class gets T log mean exp(v/T) over the dropped logits v. Of mean m and
        variance s, that is m + s/(2T) to second order. A third term c/T^2 is fitted so that T = 1,
        where it is known (`tail_lme`), comes out exactly. It falls with T, from the largest of
        them to m.
        """
        classes_BRK, values_BRK, fill_BR = self.decode_top(rows, how)
        return how.array_math.scatter(fill_BR, how.num_classes, classes_BRK, values_BRK)

    def decode_top(self, rows: dict[str, Any], how: Decoding) -> tuple[Any, Any, Any]:
        """Kept classes and their logits, [B, R, K], and the logit of each dropped class [B, R]."""
        classes_BRK, values_BRK = rows["classes"], rows["values"]
        if self.packed:
            rows = rows | {name: how.array_math.float32(rows[name]) for name in TAIL}
            classes_BRK, values_BRK = _unpack_top(rows, how.array_math)
        mean_BR, lme_BR, half_BR = rows["tail_mean"], rows["tail_lme"], rows["tail_var"] / 2
        third_BR, temperature = lme_BR - mean_BR - half_BR, how.temperature
        fitted_BR = mean_BR + half_BR / temperature + third_BR / temperature**2
        low_BR, high_BR = (mean_BR, lme_BR) if temperature >= 1 else (lme_BR, rows["tail_max"])
        return classes_BRK, values_BRK, fitted_BR.clip(low_BR, high_BR)

    def kept_logits(self, rows: Arrays, logits_BRC: Floats) -> Floats:
        """The logits of the kept classes, [B, R, K]."""
        classes_BRK = _unpack_top(rows, ArrayMath())[0] if self.packed else rows["classes"]
        kept_BRK: Floats = np.take_along_axis(logits_BRC, classes_BRK.astype(np.int64), axis=-1)
        return kept_BRK


class FeaturesCodec(BaseCodec):
    """The input of a linear head, and the head once: right at every temperature."""

    stores_features: ClassVar[bool] = True
    array_name: ClassVar[str] = "features"
    label: ClassVar[str] = "features {num_channels}"

    kind: Literal["features"] = "features"
    bits: Annotated[
        Literal[8, 16],
        Field(description="Of each feature: float16, or 8 with a scale and an offset per cell."),
    ] = 16
    num_channels: Annotated[
        int | None,
        Field(ge=1, le=2**20, description="Width of the head's input; the build fills it in."),
    ] = None

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # The document identifies caches that were recorded before there were 8 bits.
        document: dict[str, Any] = serialize(self)
        return {key: value for key, value in document.items() if (key, value) != ("bits", 16)}

    @property
    def rounding_error(self) -> float:  # type: ignore[override]
        """That of 8 bits is larger than of logits, because features are less evenly spread."""
        return 0.0 if self.bits == 16 else 0.06

    def describe(self) -> str:
        """As of all codecs, with the bits where they are not 16."""
        return super().describe() + (" in 8 bits" if self.bits == 8 else "")

    def check(self, num_classes: int) -> None:  # noqa: ARG002
        """Raise ValueError where the head's width is not known yet."""
        if self.num_channels is None:
            raise ValueError("codec.num_channels is not known: the teacher's head decides it")

    def with_channels(self, num_channels: int) -> FeaturesCodec:
        """The codec for a head of so many inputs."""
        return self.model_copy(update={"num_channels": num_channels})

    def head_shapes(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        """Weight and bias."""
        assert self.num_channels is not None  # `check` refused it
        return {"head_weight": (num_classes, self.num_channels), "head_bias": (num_classes,)}

    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:  # noqa: ARG002
        """Inputs of the head."""
        assert self.num_channels is not None  # `check` refused it
        if self.bits == 8:
            return _level_arrays("features", num_cells, self.num_channels, "channel")
        shape = (num_cells, self.num_channels)
        return (RowArray("features", "float16", shape, ("cell", "channel"), NAN),)

    def _encode(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:
        if self.bits == 8:
            return _encode_levels("features", answer_BRX)
        return super()._encode(answer_BRX, labels_BL)

    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """Features, of 8 bits each within half a level of what was encoded."""
        if self.bits == 8:
            return _decode_levels("features", rows, how)
        return super().decode(rows, how)


Codec = Annotated[DenseCodec | Int8Codec | TopKCodec | FeaturesCodec, Field(discriminator="kind")]


def class_dtype(num_classes: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """Smallest stored integer that holds every class index."""
    return np.dtype(np.uint16) if num_classes <= 2**16 else np.dtype(np.uint32)


def _pack_top(top: TopRows, moments: Arrays, num_classes: int) -> Arrays:
    """Rows of the packed form, [N, ...]."""
    blocks_NK = top.kept_NK // CLASS_BLOCK
    num_blocks = -(-num_classes // CLASS_BLOCK)
    counts_NX = (blocks_NK[..., None] == np.arange(num_blocks)).sum(axis=1)
    low_N, high_N = (
        edge.astype(np.float16) for edge in (top.values_NK.min(axis=-1), top.values_NK.max(axis=-1))
    )
    low_N1, high_N1 = low_N[:, None].astype(np.float32), high_N[:, None].astype(np.float32)
    range_N1 = np.where(high_N1 > low_N1, high_N1 - low_N1, np.float32(1))
    levels_NK = np.rint((top.values_NK - low_N1) / range_N1 * 255)
    return {
        "classes": (top.kept_NK % CLASS_BLOCK).astype(np.uint8),
        "block_counts": counts_NX.astype(np.uint8),
        "values": np.clip(levels_NK, 0, 255).astype(np.uint8),
        "low": low_N,
        "high": high_N,
        # A variance beyond float16 is clipped; the mean exponential, which T = 1 needs, is not.
        **{
            name: np.minimum(values, FLOAT16_MAX).astype(np.float16)
            for name, values in moments.items()
        },
    }


def _unpack_top(rows: dict[str, Any], array_math: ArrayMath) -> tuple[Any, Any]:
    """Kept classes [B, R, K] as whole float32, which are exact below 2**24, and their logits."""
    low_BR1, high_BR1 = (array_math.float32(rows[name])[..., None] for name in ("low", "high"))
    bytes_BRK = array_math.float32(rows["classes"])
    ranks_BRK = (bytes_BRK * 0 + 1).cumsum(-1) - 1
    ends_BRX = array_math.float32(rows["block_counts"]).cumsum(-1)
    blocks_BRK = (ranks_BRK[..., None] >= ends_BRX[..., None, :]).sum(-1)
    levels_BRK = array_math.float32(rows["values"])
    values_BRK = low_BR1 + levels_BRK * ((high_BR1 - low_BR1) / 255)
    return bytes_BRK + CLASS_BLOCK * blocks_BRK, values_BRK


def _level_arrays(
    name: str, num_cells: int, width: int, dim: str
) -> tuple[RowArray, RowArray, RowArray]:
    return (
        RowArray(name, "uint8", (num_cells, width), ("cell", dim), 0),
        RowArray("scale", "float32", (num_cells,), ("cell",), NAN),
        RowArray("offset", "float32", (num_cells,), ("cell",), NAN),
    )


def _encode_levels(name: str, answer_BRX: Floats) -> Arrays:
    """256 levels from the least to the largest value of each cell."""
    low_BR, high_BR = answer_BRX.min(axis=-1), answer_BRX.max(axis=-1)
    scale_BR = ((high_BR - low_BR) / np.float32(255)).astype(np.float32)
    # A cell whose values all agree has no range; any divisor gives level 0, which is exact.
    divisor_BR = np.where(scale_BR > 0, scale_BR, np.float32(1))
    levels_BRX = np.rint((answer_BRX - low_BR[..., None]) / divisor_BR[..., None])
    return {
        name: np.clip(levels_BRX, 0, 255).astype(np.uint8),
        "scale": scale_BR,
        "offset": low_BR.astype(np.float32),
    }


def _decode_levels(name: str, rows: dict[str, Any], how: Decoding) -> Any:
    levels_BRX = how.array_math.float32(rows[name])
    return levels_BRX * rows["scale"][..., None] + rows["offset"][..., None]


def _refuse_non_finite(answer_BRX: Floats) -> None:
    # min and max propagate NaN, so two reductions see every bad value without a boolean copy.
    low, high = answer_BRX.min(initial=0.0), answer_BRX.max(initial=0.0)
    if np.isfinite(low) and np.isfinite(high) and max(-low, high) <= FLOAT16_MAX:
        return
    bad_B: NDArray[np.bool_] = ~np.all(np.abs(answer_BRX) <= FLOAT16_MAX, axis=(1, 2))
    first = np.flatnonzero(bad_B)[:8].tolist()
    raise NonFiniteError(
        f"the teacher answered NaN, infinity or beyond +-{FLOAT16_MAX:.0f} for {int(bad_B.sum())} "
        f"of {len(bad_B)} views (rows {first} of the batch)."
    )
