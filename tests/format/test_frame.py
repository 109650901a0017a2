"""Rows on the wire: what is sent is what safetensors reads, and nothing else is taken."""

from __future__ import annotations

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from support.caches import make_rows, make_spec
from support.frames import encode_frame

from cache_service.errors import CorruptError
from cache_service.format.frame import (
    checksum_of,
    decode_frame,
    frame_header,
    range_metadata,
)
from cache_service.format.layout import CacheLayout

CODECS = [
    {"kind": "dense"},
    {"kind": "int8"},
    {"kind": "topk", "k": 3},
    {"kind": "features", "num_channels": 5},
]


def sent(codec, num_rows=5):
    spec = make_spec(codec=codec)
    arrays = CacheLayout(spec).arrays
    rows = {name: values[:num_rows] for name, values in make_rows(spec, 0).items()}
    metadata = range_metadata("f" * 64, 0, 0, num_rows)
    body = encode_frame(arrays, rows, frame_header(arrays, num_rows, metadata))
    return arrays, rows, metadata, body


def decoded(body, arrays, metadata, *, num_rows=5, checksum=None):
    return decode_frame(
        body,
        checksum=checksum_of(body) if checksum is None else checksum,
        arrays=arrays,
        num_rows=num_rows,
        metadata=metadata,
        what="GET rows",
    )


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec["kind"])
def test_a_frame_is_a_safetensors_document_of_the_rows(codec):
    arrays, rows, metadata, body = sent(codec)
    for found in (safetensors.numpy.load(body), decoded(body, arrays, metadata)):
        assert set(found) == set(rows)
        for name, values in rows.items():
            assert found[name].dtype == values.dtype
            np.testing.assert_array_equal(found[name], values)


def test_values_begin_at_a_multiple_of_eight():
    arrays, _, metadata, _ = sent({"kind": "dense"})
    for num_rows in range(1, 20):
        assert len(frame_header(arrays, num_rows, metadata)) % 8 == 0


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused(where, bit):
    arrays, _, metadata, body = sent({"kind": "int8"})
    damaged = bytearray(body)
    damaged[int(where * len(body))] ^= 1 << bit
    with pytest.raises(CorruptError, match="damaged on the way"):
        decoded(bytes(damaged), arrays, metadata, checksum=checksum_of(body))


@given(cut=st.integers(1, 400))
def test_a_short_or_a_long_body_is_refused(cut):
    arrays, _, metadata, body = sent({"kind": "dense"})
    for changed in (body[:-cut], body + b"\0" * cut):
        with pytest.raises(CorruptError, match=r"bytes; [0-9]+ were expected"):
            decoded(changed, arrays, metadata)


def test_an_answer_to_another_question_is_refused():
    arrays, _, metadata, body = sent({"kind": "dense"})
    for other in (
        metadata | {"fingerprint": "e" * 64},
        metadata | {"seed": "1"},
        metadata | {"start": "5", "stop": "9"},
    ):
        with pytest.raises(CorruptError, match="returned other arrays or rows than were requested"):
            decoded(body, arrays, other)
    with pytest.raises(CorruptError, match=r"bytes; [0-9]+ were expected"):
        decoded(body, arrays[:-1], metadata)
    with pytest.raises(CorruptError, match=r"bytes; [0-9]+ were expected|returned other arrays"):
        decoded(body, arrays, metadata, num_rows=4)


def test_a_body_without_a_checksum_is_refused():
    arrays, _, metadata, body = sent({"kind": "dense"})
    with pytest.raises(CorruptError, match="its header says nothing"):
        decode_frame(
            body, checksum=None, arrays=arrays, num_rows=5, metadata=metadata, what="GET rows"
        )
