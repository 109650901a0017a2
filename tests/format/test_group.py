"""The root document: sealed, and regenerated from the spec before it is believed."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from support.caches import VERSIONS, make_spec

from cache_service.errors import ConfigError, CorruptError, NotACacheError
from cache_service.format.canonical import canonical_json, crc32c
from cache_service.format.group import Group, decode_group, encode_group

SPEC = make_spec()
GROUP = Group(SPEC, VERSIONS, {"seed": 1}, {})


def sealed(**changes: Any) -> bytes:
    """The document with facts changed by somebody who also works out the seal."""
    document = json.loads(encode_group(GROUP))
    facts = document["attributes"]["kd_cache"] | changes
    del facts["crc32c"]
    facts["crc32c"] = crc32c(canonical_json(facts))
    document["attributes"]["kd_cache"] = facts
    return canonical_json(document)


def with_spec(**changes: Any) -> bytes:
    spec = SPEC.model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split("__")
        here = spec
        for parent in parents:
            here = here[parent]
        here[last] = value
    return sealed(spec=spec)


def test_a_group_comes_back_as_it_was():
    assert decode_group(encode_group(GROUP), "here") == GROUP


def test_a_root_document_with_any_bit_flipped_is_refused():
    content = encode_group(GROUP)
    for bit in range(0, 8 * len(content), 3):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises((CorruptError, NotACacheError), match="here"):
            decode_group(bytes(flipped), "here")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"null", b"{}", b'{"attributes": {}}', b"\xff"),
        b'{"attributes": {"kd_cache": [1]}}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
    ids=lambda content: repr(content[:40]),
)
def test_another_zarr_group_is_not_a_cache(content):
    with pytest.raises(NotACacheError, match="here holds a Zarr group, but not one that kd-cache"):
        decode_group(content, "here")


def test_a_newer_format_is_not_read():
    with pytest.raises(NotACacheError, match="cache of format 2; this version reads format 1"):
        decode_group(sealed(format=2), "here")


@pytest.mark.parametrize(
    "content",
    [
        # Changed, though its seal was worked out anew: the fingerprint is of another spec.
        with_spec(teacher__weights_sha256="b" * 64),
        with_spec(teacher__num_classes=10**9),
        with_spec(dataset__num_samples=10**12),
        with_spec(scales=[1] * 10),
        with_spec(codec={"kind": "pickle"}),
        with_spec(codec={"kind": "features", "compression": "none", "num_channels": None}),
        with_spec(recipe__size=10**9),
        with_spec(layout__shard_rows=2**40),
        sealed(fingerprint="0" * 64),
        sealed(versions=[]),
        sealed(provenance="all"),
        sealed(head_crc32c={"head_bias": 1}),
        sealed(head_crc32c=None),
        sealed(more=1),
        encode_group(GROUP) + b" ",
    ],
)
def test_a_document_that_contradicts_itself_is_refused(content):
    with pytest.raises(CorruptError, match=r"zarr\.json is not what was written: its seal"):
        decode_group(content, "here")


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999", b"-1e999"])
def test_a_number_that_json_does_not_have_is_refused(number):
    content = encode_group(GROUP).replace(b'"seed":1', b'"seed":' + number)
    with pytest.raises(CorruptError, match="seal"):
        decode_group(content, "here")


def nested(depth: int) -> bytes:
    """A root document with lists in lists in its provenance, well sealed."""
    deep = b'"seed":' + b"[" * depth + b"]" * depth
    document = json.loads(encode_group(GROUP))
    facts = document["attributes"]["kd_cache"]
    del facts["crc32c"]
    facts["crc32c"] = crc32c(canonical_json(facts).replace(b'"seed":1', deep))
    return canonical_json(document).replace(b'"seed":1', deep)


@pytest.mark.parametrize("depth", [2_000, 20_000, 200_000])
def test_attributes_nested_too_deep_to_walk_are_refused(depth):
    with pytest.raises((CorruptError, NotACacheError), match="here"):
        decode_group(nested(depth), "here")


def test_attributes_nested_near_the_limit_are_read_or_refused():
    assert decode_group(nested(2), "here").provenance == {"seed": [[]]}
    for depth in range(700, 1_000, 10):
        with contextlib.suppress(CorruptError, NotACacheError):
            decode_group(nested(depth), "here")


def test_a_cache_that_would_fill_memory_is_refused_though_it_is_whole():
    spec = make_spec(num_classes=2**24, scales=(1,), shard_rows=2**14, chunk_rows=2**14)
    group = Group(spec, {}, {}, {})
    with pytest.raises(ConfigError, match="one chunk of logits would hold 549755813888 bytes"):
        decode_group(encode_group(group), "here")
