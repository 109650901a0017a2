"""A commit stands for one shard of one cache, and says so in bytes that cannot change unnoticed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from cache_service.errors import CorruptError
from cache_service.format.canonical import canonical_json, crc32c
from cache_service.format.commit import Commit, commit_key, decode_commit, encode_commit
from cache_service.format.shard import ChunkTable

TABLE = ChunkTable(92, 77, np.array([40, 32]), np.array([1, 2**32 - 1], np.uint32))
COMMIT = Commit("f" * 64, 3, 7, {"sample": TABLE, "witness": TABLE}, {"pillow": "13.0.0"})


def decode(content: bytes, **changes: Any) -> Commit:
    place: dict[str, Any] = {"fingerprint": "f" * 64, "seed": 3, "shard": 7}
    return decode_commit(content, **(place | {"names": ("sample", "witness")} | changes))


def sealed(**changes: Any) -> bytes:
    """The commit with fields changed by somebody who also works out the checksum."""
    document = json.loads(encode_commit(COMMIT)) | changes
    del document["crc32c"]
    return canonical_json(document | {"crc32c": crc32c(canonical_json(document))})


def with_table(**changes: Any) -> bytes:
    entry = json.loads(encode_commit(COMMIT))["objects"]["sample"]
    return sealed(objects={"sample": entry | changes, "witness": entry})


def test_a_commit_comes_back_as_it_was():
    back = decode(encode_commit(COMMIT))
    assert back.versions == COMMIT.versions
    assert (back.fingerprint, back.seed, back.shard) == ("f" * 64, 3, 7)
    for name, table in COMMIT.objects.items():
        assert back.objects[name].size == table.size
        assert back.objects[name].index_crc32c == table.index_crc32c
        np.testing.assert_array_equal(back.objects[name].sizes, table.sizes)
        np.testing.assert_array_equal(back.objects[name].checksums, table.checksums)
        assert back.objects[name].offsets.tolist() == [0, 44]


def test_equal_commits_are_equal_bytes_and_hold_no_clock_and_no_host():
    content = encode_commit(COMMIT)
    assert content == encode_commit(COMMIT)
    assert json.loads(content).keys() == {
        *("crc32c", "fingerprint", "objects", "seed", "shard", "versions")
    }


def test_a_commit_with_any_bit_flipped_is_refused():
    content = encode_commit(COMMIT)
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptError, match=r"commit commits/3/7.json (is damaged|says)"):
            decode(bytes(flipped))


def test_a_commit_cut_short_is_refused():
    content = encode_commit(COMMIT)
    for length in range(len(content)):
        with pytest.raises(CorruptError, match=r"commits/3/7\.json is damaged"):
            decode(content[:length])


@pytest.mark.parametrize(
    "content",
    [
        *(b"[]", b"null", b"3", b'"commit"', b"{}", b'{"crc32c": 0}', b"\xff\xfe", b"NaN"),
        encode_commit(COMMIT) + b"\n",
        json.dumps(json.loads(encode_commit(COMMIT))).encode(),
        b"[" * 100_000,
        b'{"a":' * 5_000,
    ],
    ids=lambda content: repr(content[:20]),
)
def test_what_is_not_the_canonical_bytes_of_a_commit_is_refused(content):
    with pytest.raises(CorruptError, match="is damaged"):
        decode(content)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ({"fingerprint": "e" * 64}, "says fingerprint='ff.*', but it lies where fingerprint='ee"),
        (
            {"seed": 4},
            "commits/4/7.json says seed=3, but it lies where seed=4 belongs: it was",
        ),
        ({"shard": 6}, "commits/3/6.json says shard=7, but it lies where shard=6 belongs"),
        ({"names": ("sample",)}, "names other arrays than the cache has"),
        ({"names": ("sample", "witness", "logits")}, "names other arrays"),
    ],
)
def test_a_commit_of_another_place_is_refused(place, says):
    with pytest.raises(CorruptError, match=says):
        decode(encode_commit(COMMIT), **place)


@pytest.mark.parametrize(
    "content",
    [
        sealed(objects=None),
        sealed(objects=[]),
        sealed(objects={"sample": None, "witness": 3}),
        sealed(objects={"sample": {}, "witness": {}}),
        sealed(versions=None),
        with_table(size=None),
        with_table(size=92.5),
        with_table(index_crc32c=-1),
        with_table(chunk_sizes=40),
        with_table(chunk_sizes=["40", "32"]),
        with_table(chunk_sizes=[40.5, 32]),
        with_table(chunk_sizes=[40]),
        with_table(chunk_sizes=[2**64, 32]),
        with_table(chunk_crc32c=[-1, 2]),
        with_table(chunk_crc32c=[2**32, 2]),
    ],
)
def test_a_well_sealed_commit_of_another_form_is_refused(content):
    with pytest.raises(CorruptError, match="is not of the form of a commit"):
        decode(content)


def test_advice_is_to_repair_and_to_build_again():
    with pytest.raises(CorruptError, match=r"commits/3/7.json is damaged") as refusal:
        decode(b"")
    assert "kd-cache verify" in refusal.value.hint
    assert "kd-cache build" in refusal.value.hint


def test_a_commit_lies_where_its_seed_and_shard_say():
    assert commit_key(3, 7) == "commits/3/7.json"
