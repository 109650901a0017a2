"""Equal documents are equal bytes; checksums are the published ones and may be joined."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.format.canonical import canonical_json, crc32c, joined_crc32c, sha256_hex

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)

SIZES = (0, 1, 3, 4, 31, 256, 4096)
PARTS = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 255), st.booleans()), max_size=8)


def test_keys_are_sorted_and_nothing_is_spaced():
    assert canonical_json({"b": [1, 2], "a": {"d": None, "c": 0.1}}) == (
        b'{"a":{"c":0.1,"d":null},"b":[1,2]}'
    )


def test_text_is_ascii_whatever_it_says():
    assert canonical_json({"name": "Müller"}) == b'{"name":"M\\u00fcller"}'


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_json_does_not_have_is_refused(value):
    with pytest.raises(ValueError, match="Out of range float"):
        canonical_json({"mean": value})


@given(DOCUMENTS)
def test_reading_and_writing_again_gives_the_same_bytes(document):
    content = canonical_json(document)
    assert canonical_json(json.loads(content)) == content


def test_the_checksum_of_the_rfc_is_ours():
    # RFC 3720, B.4: 32 bytes of zeros, of ones, and 0 to 31.
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


def test_a_checksum_does_not_depend_on_the_kind_of_buffer():
    content = bytes(range(200)) * 3
    view = memoryview(np.frombuffer(content, np.uint8))
    assert crc32c(content) == crc32c(view) == crc32c(memoryview(content))
    assert crc32c(view[7:90]) == crc32c(content[7:90])


def test_sha256_is_written_in_hexadecimal():
    assert sha256_hex(b"abc").startswith("ba7816bf")
    assert len(sha256_hex(b"abc")) == 64


@given(parts=PARTS)
def test_joined_is_the_checksum_of_the_whole_whichever_parts_are_known(parts):
    contents = [bytes((fill + n) % 256 for n in range(size)) for size, fill, _ in parts]
    pieces = [
        (content, crc32c(content) if known else None)
        for content, (_, _, known) in zip(contents, parts, strict=True)
    ]
    assert joined_crc32c(pieces) == crc32c(b"".join(contents))


@pytest.mark.parametrize("size", [1 << 19, (1 << 19) + 4])
def test_a_chunk_of_half_a_mebibyte_is_joined_without_being_read(size):
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    known = crc32c(content)
    assert joined_crc32c([(b"head", None), (content, known)]) == crc32c(b"head" + content)
    assert joined_crc32c([(b"head", None), (bytes(size), known)]) == crc32c(b"head" + content)
