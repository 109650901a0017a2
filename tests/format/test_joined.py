"""The checksum of joined bytes, out of the parts' checksums, against one pass over all of them."""

from __future__ import annotations

import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from hypothesis import given
from hypothesis import strategies as st

from cache_service.format.canonical import crc32c, joined_crc32c

SIZES = (0, 1, 3, 4, 31, 256, 4096)
PARTS = st.lists(st.tuples(st.sampled_from(SIZES), st.integers(0, 255), st.booleans()), max_size=8)


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
