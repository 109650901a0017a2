"""How a teacher's answers become stored arrays and logits again. No I/O, no torch.

There is one class per codec. It holds the codec's settings, lists its arrays, refuses what it
cannot hold, encodes and decodes. Code outside of this file asks a codec, not for its kind.

Shape letters: B batch, R stored cells, C classes, K kept classes, D channels, L labels, X either
classes or channels.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cache_service.config import Frozen
from cache_service.errors import NonFiniteError

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]

FLOAT16_MAX = 65504.0
"""Largest finite float16. A logit beyond it is refused: stored, it would read as infinity."""

NAN = float("nan")


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


class ArrayMath(Protocol):
    """What decoding needs of an array library beside arithmetic and `[..., None]`.

    The same formulas run on numpy here and on torch where students train.
    """

    def float32(self, values: Any) -> Any:
        """The values as float32."""
        ...

    def clip(self, values: Any, low: Any, high: Any) -> Any:
        """The values, each at least `low` and at most `high`; all of one shape."""
        ...

    def scatter(self, fill: Any, width: int, index: Any, values: Any) -> Any:
        """A new array [..., width] of `fill` [...], `values` put at `index` of the last axis."""
        ...


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


class NumpyMath:
    """`ArrayMath` in numpy."""

    def float32(self, values: NDArray[Any]) -> Floats:
        """The values as float32."""
        return values.astype(np.float32)

    def clip(self, values: Floats, low: Floats, high: Floats) -> Floats:
        """The values, each at least `low` and at most `high`."""
        return np.clip(values, low, high)

    def scatter(
        self, fill: Floats, width: int, index: NDArray[Any], values: NDArray[Any]
    ) -> Floats:
        """A new array [..., width] of `fill` with `values` at `index`."""
        dense = np.broadcast_to(fill[..., None], (*fill.shape, width)).astype(np.float32)
        np.put_along_axis(dense, index.astype(np.int64), values.astype(np.float32), axis=-1)
        return dense


class BaseCodec(Frozen):
    """The interface of a codec.

    Attributes:
        stores_features: whether the inputs of a linear head are stored in place of logits.
        drops_classes: whether the logits of some classes are stored in summary only.
        rounding_error: root-mean-square error of the stored logits beyond that of float16, as a
            fraction of their standard deviation over the classes of a cell, at most.
    """

    stores_features: ClassVar[bool] = False
    drops_classes: ClassVar[bool] = False
    rounding_error: ClassVar[float] = 0.0

    compression: Annotated[
        Literal["none", "zstd"],
        Field(description="Of each chunk. `none` lets local readers map the file."),
    ] = "none"

    @abstractmethod
    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:
        """The arrays that hold `num_cells` stored cells of each view."""

    @abstractmethod
    def encode_finite(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:
        """As `encode`, of answers that float16 can hold."""

    @abstractmethod
    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """The stored cells of rows, float32 [B, R, X]: logits, or features to apply the head to."""

    @abstractmethod
    def describe_values(self) -> str:
        """What is stored, in a word or two."""

    def describe(self) -> str:
        """What is stored, and the compression where there is one: `topk 32, zstd`."""
        text = self.describe_values()
        return text if self.compression == "none" else f"{text}, {self.compression}"

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
        return self.encode_finite(answer_BRX, labels_BL)

    def check(self, num_classes: int) -> None:
        """Raise ValueError where the settings do not fit a teacher of so many classes."""

    def with_channels(self, num_channels: int) -> BaseCodec:  # noqa: ARG002  for one codec
        """The codec for a head of so many inputs."""
        return self

    def head_shapes(self, num_classes: int) -> dict[str, tuple[int, ...]]:  # noqa: ARG002
        """Shapes of the constant float32 arrays that decoding needs, by name."""
        return {}

    def kept_logits(self, rows: Arrays, logits_BRC: Floats) -> Floats:  # noqa: ARG002
        """Those of the logits whose single values the rows hold, [B, R, C] or [B, R, K]."""
        return logits_BRC

    @property
    def num_kept(self) -> int | None:
        """Classes kept per cell; None where all are."""
        return None


class DenseCodec(BaseCodec):
    """Every logit as float16: 2 bytes a class."""

    kind: Literal["dense"] = "dense"

    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:
        """See `BaseCodec`."""
        shape = (num_cells, num_classes)
        return (RowArray("logits", "float16", shape, ("cell", "class"), NAN),)

    def encode_finite(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:  # noqa: ARG002
        """See `BaseCodec`."""
        return {"logits": answer_BRX.astype(np.float16)}

    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """See `BaseCodec`."""
        return how.array_math.float32(rows["logits"])

    def describe_values(self) -> str:
        """See `BaseCodec`."""
        return "dense float16"


class Int8Codec(BaseCodec):
    """Every logit as uint8 with a scale and an offset per cell: 1 byte a class + 8."""

    kind: Literal["int8"] = "int8"
    rounding_error: ClassVar[float] = 0.03

    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:
        """See `BaseCodec`."""
        return (
            RowArray("logits", "uint8", (num_cells, num_classes), ("cell", "class"), 0),
            RowArray("scale", "float32", (num_cells,), ("cell",), NAN),
            RowArray("offset", "float32", (num_cells,), ("cell",), NAN),
        )

    def encode_finite(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:  # noqa: ARG002
        """See `BaseCodec`."""
        low_BR, high_BR = answer_BRX.min(axis=-1), answer_BRX.max(axis=-1)
        scale_BR = ((high_BR - low_BR) / np.float32(255)).astype(np.float32)
        # A cell whose classes all agree has no range; any divisor gives level 0, which is exact.
        divisor_BR = np.where(scale_BR > 0, scale_BR, np.float32(1))
        levels_BRC = np.rint((answer_BRX - low_BR[..., None]) / divisor_BR[..., None])
        return {
            "logits": np.clip(levels_BRC, 0, 255).astype(np.uint8),
            "scale": scale_BR,
            "offset": low_BR.astype(np.float32),
        }

    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """See `BaseCodec`."""
        levels_BRC = how.array_math.float32(rows["logits"])
        return levels_BRC * rows["scale"][..., None] + rows["offset"][..., None]

    def describe_values(self) -> str:
        """See `BaseCodec`."""
        return "int8"


class TopKCodec(BaseCodec):
    """The k largest logits, the label's among them, and the moments of the rest."""

    drops_classes: ClassVar[bool] = True

    kind: Literal["topk"] = "topk"
    k: Annotated[int, Field(ge=3, description="Classes kept per cell, labels included.")]

    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:
        """See `BaseCodec`."""
        kept = ((num_cells, self.k), ("cell", "rank"))
        tail = ("tail_mean", "tail_var", "tail_max", "tail_lme")
        return (
            RowArray("classes", class_dtype(num_classes).name, *kept, 0),
            RowArray("values", "float16", *kept, NAN),
            *(RowArray(name, "float32", (num_cells,), ("cell",), NAN) for name in tail),
        )

    def check(self, num_classes: int) -> None:
        """Raise ValueError where nothing would be dropped."""
        if self.k >= num_classes:
            raise ValueError(
                f"codec.k={self.k} is not below num_classes={num_classes}; "
                "use `codec: {kind: dense}` to keep every class"
            )

    def encode_finite(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:
        """See `BaseCodec`."""
        num_classes = answer_BRX.shape[-1]
        ranked_BRC = answer_BRX.astype(np.float64)
        labels_BRL = np.broadcast_to(
            labels_BL[:, None, :], (*answer_BRX.shape[:2], labels_BL.shape[-1])
        )
        # Labels are lifted above everything, so they are kept whatever their logit.
        np.put_along_axis(ranked_BRC, labels_BRL, np.inf, axis=-1)
        order_BRC = np.argsort(-ranked_BRC, axis=-1, kind="stable")
        # Sorted by class, so that the bytes do not depend on ties, and readers may search them.
        kept_BRK = np.sort(order_BRC[..., : self.k], axis=-1)
        dropped_BRX = order_BRC[..., self.k :]
        tail_BRX = np.take_along_axis(answer_BRX, dropped_BRX, axis=-1).astype(np.float64)
        return {
            "classes": kept_BRK.astype(class_dtype(num_classes)),
            "values": np.take_along_axis(answer_BRX, kept_BRK, axis=-1).astype(np.float16),
            "tail_mean": tail_BRX.mean(axis=-1).astype(np.float32),
            "tail_var": tail_BRX.var(axis=-1).astype(np.float32),
            "tail_max": tail_BRX.max(axis=-1).astype(np.float32),
            "tail_lme": _log_mean_exp(tail_BRX).astype(np.float32),
        }

    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """Dense logits whose softmax at `temperature` gives the dropped classes their joint weight.

        Each dropped class gets T log mean exp(v/T) over the dropped logits v. Of mean m and
        variance s, that is m + s/(2T) to second order. A third term c/T^2 is fitted so that T = 1,
        where it is known (`tail_lme`), comes out exactly. It falls with T, from the largest of
        them to m.
        """
        mean_BR, lme_BR, half_BR = rows["tail_mean"], rows["tail_lme"], rows["tail_var"] / 2
        third_BR, temperature = lme_BR - mean_BR - half_BR, how.temperature
        fitted_BR = mean_BR + half_BR / temperature + third_BR / temperature**2
        low_BR, high_BR = (mean_BR, lme_BR) if temperature >= 1 else (lme_BR, rows["tail_max"])
        fill_BR = how.array_math.clip(fitted_BR, low_BR, high_BR)
        return how.array_math.scatter(fill_BR, how.num_classes, rows["classes"], rows["values"])

    def describe_values(self) -> str:
        """See `BaseCodec`."""
        return f"topk {self.k}"

    def kept_logits(self, rows: Arrays, logits_BRC: Floats) -> Floats:
        """See `BaseCodec`."""
        kept_BRK: Floats = np.take_along_axis(logits_BRC, rows["classes"].astype(np.int64), axis=-1)
        return kept_BRK

    @property
    def num_kept(self) -> int | None:
        """See `BaseCodec`."""
        return self.k


class FeaturesCodec(BaseCodec):
    """The input of a linear head as float16, and the head once: exact at every temperature."""

    stores_features: ClassVar[bool] = True

    kind: Literal["features"] = "features"
    num_channels: Annotated[
        int | None,
        Field(ge=1, le=2**20, description="Width of the head's input; the build fills it in."),
    ] = None

    def arrays(self, num_cells: int, num_classes: int) -> tuple[RowArray, ...]:  # noqa: ARG002
        """See `BaseCodec`."""
        assert self.num_channels is not None  # `check` refused it
        shape = (num_cells, self.num_channels)
        return (RowArray("features", "float16", shape, ("cell", "channel"), NAN),)

    def check(self, num_classes: int) -> None:  # noqa: ARG002
        """Raise ValueError where the head's width is not known yet."""
        if self.num_channels is None:
            raise ValueError("codec.num_channels is not known: the teacher's head decides it")

    def with_channels(self, num_channels: int) -> FeaturesCodec:
        """The codec for a head of so many inputs."""
        return self.model_copy(update={"num_channels": num_channels})

    def head_shapes(self, num_classes: int) -> dict[str, tuple[int, ...]]:
        """See `BaseCodec`."""
        assert self.num_channels is not None  # `check` refused it
        return {"head_weight": (num_classes, self.num_channels), "head_bias": (num_classes,)}

    def encode_finite(self, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:  # noqa: ARG002
        """See `BaseCodec`."""
        return {"features": answer_BRX.astype(np.float16)}

    def decode(self, rows: dict[str, Any], how: Decoding) -> Any:
        """See `BaseCodec`."""
        return how.array_math.float32(rows["features"])

    def describe_values(self) -> str:
        """See `BaseCodec`."""
        return f"features {self.num_channels}"


Codec = Annotated[DenseCodec | Int8Codec | TopKCodec | FeaturesCodec, Field(discriminator="kind")]


def class_dtype(num_classes: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """Smallest stored integer that holds every class index."""
    return np.dtype(np.uint16) if num_classes <= 2**16 else np.dtype(np.uint32)


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


def _log_mean_exp(tail_BRX: NDArray[np.float64]) -> NDArray[np.float64]:
    largest_BR: NDArray[np.float64] = tail_BRX.max(axis=-1)
    mean_BR: NDArray[np.float64] = np.exp(tail_BRX - largest_BR[..., None]).mean(axis=-1)
    return largest_BR + np.log(mean_BR)
