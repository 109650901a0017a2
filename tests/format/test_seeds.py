"""Seeds as people write them, and back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_service.format.seeds import MAX_SEED, describe_seeds, parse_seeds


@pytest.mark.parametrize(
    ("written", "seeds"),
    [
        ("0:3", (0, 1, 2)),
        ("7", (7,)),
        (7, (7,)),
        (["4:6", 0, "4"], (0, 4, 5)),
        (str(MAX_SEED - 1), (MAX_SEED - 1,)),
    ],
)
def test_seeds_are_read_as_written(written, seeds):
    assert parse_seeds(written) == seeds


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("", "is not of the form 0:30"),
        ("all", "is not of the form 0:30"),
        ("-1", "is not of the form"),
        ("0-3", "is not of the form"),
        ("0:", "is not of the form"),
        (":3", "is not of the form"),
        ("0:1:2", "is not of the form"),
        ("1.5", "is not of the form"),
        ("\u0663", "is not of the form"),
        (None, "is not of the form"),
        (True, "is not of the form"),
        ("3:3", "names no seed"),
        ("3:1", "names no seed"),
        (str(MAX_SEED), "names no seed"),
        ([], "seeds is an empty list"),
        (["0:2", "x"], "is not of the form"),
    ],
)
def test_every_bound_is_enforced_and_says_why(written, says):
    with pytest.raises(ValueError, match=says):
        parse_seeds(written)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_what_is_described_reads_back_as_the_same_seeds(seeds):
    described = describe_seeds(sorted(seeds))
    assert parse_seeds(described.split(", ")) == tuple(sorted(seeds))


def test_no_seeds_are_described_as_none():
    assert describe_seeds([]) == "none"
