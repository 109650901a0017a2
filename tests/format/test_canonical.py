"""Equal documents are equal bytes, and both checksums are the published ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.format.canonical import canonical_json, crc32c, sha256_hex

DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


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
