"""Logits <-> the arrays that are stored. numpy only: no I/O, no torch.

Shape letters: B batch, R stored cells, C classes, K kept classes, D channels, L labels.
Every encoder refuses what it cannot hold; every decoder returns float32 [B, R, C] logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import NonFiniteError
from cache_service.format.spec import (
    CacheSpec,
    Codec,
    DenseCodec,
    FeaturesCodec,
    Int8Codec,
)

Arrays = dict[str, NDArray[Any]]
Floats = NDArray[np.float32]

FLOAT16_MAX = 65504.0
"""Largest finite float16. A logit beyond it is refused: stored, it would read as infinity."""


class Head(NamedTuple):
    """A linear classifier: logits = features @ weight_CD.T + bias_C, both float32."""

    weight_CD: Floats
    bias_C: Floats


def encode(codec: Codec, answer_BRX: Floats, labels_BL: NDArray[np.int64]) -> Arrays:
    """Arrays to store for one batch of answers.

    Args:
        codec: how.
        answer_BRX: float32 logits [B, R, C], or for `features` the head's inputs [B, R, D].
        labels_BL: the classes whose logits must survive exactly: the sample's label and, in a
            mixed view, the partner's (repeat the own label where there is none).

    Raises:
        NonFiniteError: NaN, infinity, or a magnitude that float16 cannot hold.
    """
    _refuse_non_finite(answer_BRX)
    if isinstance(codec, DenseCodec):
        return {"logits": answer_BRX.astype(np.float16)}
    if isinstance(codec, FeaturesCodec):
        return {"features": answer_BRX.astype(np.float16)}
    if isinstance(codec, Int8Codec):
        return _encode_int8(answer_BRX)
    return _encode_topk(answer_BRX, labels_BL, codec.k)


def decode(spec: CacheSpec, rows: Arrays, *, temperature: float = 1.0, head: Head | None) -> Floats:
    """Logits of the stored cells, float32 [B, R, C].

    `temperature` matters for `topk` alone: a dropped class gets the value that gives the dropped
    ones together the right weight in a softmax at that temperature (see `_decode_topk`).
    """
    codec = spec.codec
    if isinstance(codec, DenseCodec):
        dense_BRC: Floats = rows["logits"].astype(np.float32)
        return dense_BRC
    if isinstance(codec, FeaturesCodec):
        assert head is not None
        features_BRD: Floats = rows["features"].astype(np.float32)
        return features_BRD @ head.weight_CD.T + head.bias_C
    if isinstance(codec, Int8Codec):
        scale_BR, offset_BR = rows["scale"], rows["offset"]
        logits_BRC: Floats = rows["logits"] * scale_BR[..., None] + offset_BR[..., None]
        return logits_BRC
    return _decode_topk(rows, spec.teacher.num_classes, temperature)


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


def _encode_int8(logits_BRC: Floats) -> Arrays:
    low_BR, high_BR = logits_BRC.min(axis=-1), logits_BRC.max(axis=-1)
    scale_BR = ((high_BR - low_BR) / np.float32(255)).astype(np.float32)
    # A cell whose classes all agree has no range; any divisor gives level 0, which is exact.
    divisor_BR = np.where(scale_BR > 0, scale_BR, np.float32(1))
    levels_BRC = np.rint((logits_BRC - low_BR[..., None]) / divisor_BR[..., None])
    return {
        "logits": np.clip(levels_BRC, 0, 255).astype(np.uint8),
        "scale": scale_BR,
        "offset": low_BR.astype(np.float32),
    }


def class_dtype(num_classes: int) -> np.dtype[np.uint16] | np.dtype[np.uint32]:
    """Smallest stored integer that holds every class index."""
    return np.dtype(np.uint16) if num_classes <= 2**16 else np.dtype(np.uint32)


def _encode_topk(logits_BRC: Floats, labels_BL: NDArray[np.int64], k: int) -> Arrays:
    num_classes = logits_BRC.shape[-1]
    ranked_BRC = logits_BRC.astype(np.float64)
    labels_BRL = np.broadcast_to(
        labels_BL[:, None, :], (*logits_BRC.shape[:2], labels_BL.shape[-1])
    )
    # Labels are lifted above everything, so they are kept whatever their logit.
    np.put_along_axis(ranked_BRC, labels_BRL, np.inf, axis=-1)
    order_BRC = np.argsort(-ranked_BRC, axis=-1, kind="stable")
    # Sorted by class, so that the bytes do not depend on ties, and readers may search them.
    kept_BRK = np.sort(order_BRC[..., :k], axis=-1)
    tail_BRC = np.take_along_axis(logits_BRC, order_BRC[..., k:], axis=-1).astype(np.float64)
    return {
        "classes": kept_BRK.astype(class_dtype(num_classes)),
        "values": np.take_along_axis(logits_BRC, kept_BRK, axis=-1).astype(np.float16),
        "tail_mean": tail_BRC.mean(axis=-1).astype(np.float32),
        "tail_var": tail_BRC.var(axis=-1).astype(np.float32),
        "tail_max": tail_BRC.max(axis=-1).astype(np.float32),
        "tail_lme": _log_mean_exp(tail_BRC).astype(np.float32),
    }


def _log_mean_exp(tail_BRX: NDArray[np.float64]) -> NDArray[np.float64]:
    largest_BR: NDArray[np.float64] = tail_BRX.max(axis=-1)
    mean_BR: NDArray[np.float64] = np.exp(tail_BRX - largest_BR[..., None]).mean(axis=-1)
    return largest_BR + np.log(mean_BR)


def _decode_topk(rows: Arrays, num_classes: int, temperature: float) -> Floats:
    """Dense logits whose softmax at `temperature` gives the dropped classes their joint weight.

    Each dropped class gets T log mean exp(v/T) over the dropped logits v. Of mean m and variance
    s, that is m + s/(2T) to second order. A third term c/T^2 is fitted so that T = 1, where it is
    known (`tail_lme`), comes out exactly. It falls with T, from the largest of them to m.
    """
    mean_BR, lme_BR = rows["tail_mean"], rows["tail_lme"]
    third_BR = lme_BR - mean_BR - rows["tail_var"] / np.float32(2)
    fitted_BR = mean_BR + rows["tail_var"] / np.float32(2 * temperature)
    fitted_BR = fitted_BR + third_BR / np.float32(temperature**2)
    low_BR, high_BR = (mean_BR, lme_BR) if temperature >= 1 else (lme_BR, rows["tail_max"])
    fill_BR = np.clip(fitted_BR, low_BR, high_BR).astype(np.float32)
    shape = (*fill_BR.shape, num_classes)
    logits_BRC = np.broadcast_to(fill_BR[..., None], shape).copy()
    values_BRK = rows["values"].astype(np.float32)
    np.put_along_axis(logits_BRC, rows["classes"].astype(np.int64), values_BRK, axis=-1)
    return logits_BRC
