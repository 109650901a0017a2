"""The fast encoder of `topk` gives the bytes of its definition, which sorts every class."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_service.format.codecs import TopKCodec
from cache_service.format.topk import rank_rows, summarize_rows

# How logits come in practice, and worse: (name, function of random bell curves).
SHAPES = {
    "float32": lambda z: z,
    "bfloat16": lambda z: (z.view(np.uint32) & 0xFFFF0000).view(np.float32),
    "whole numbers": np.rint,
    "few values": lambda z: np.sign(z),
    "no negatives": lambda z: np.maximum(z, 0),
    "signed zeros": lambda z: np.copysign(np.float32(0), z),
    "all equal": lambda z: np.full_like(z, z.flat[0]),
    "far from zero": lambda z: z + np.float32(9000),
    "far below zero": lambda z: z - np.float32(9000),
    "subnormal exponentials": lambda z: z - np.float32(740),
    "far apart from zero, close together": lambda z: z / 1000 + np.float32(500),
    "wide": lambda z: z * np.float32(9000),
    "tiny": lambda z: z * np.float32(1e-42),
    "probabilities": lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True)),
}


def assert_same_bytes(logits: np.ndarray, labels: np.ndarray, k: int) -> None:
    fast, defined = summarize_rows(logits, labels, k), rank_rows(logits, labels, k)
    for name, got, wanted in zip(fast._fields, fast, defined, strict=True):
        assert got.dtype == wanted.dtype, name
        assert got.tobytes() == wanted.tobytes(), name


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.integers(0, 2**32 - 1),
    st.integers(4, 300),
    st.integers(1, 40),
    st.data(),
)
def test_the_bytes_are_those_of_sorting_every_class(shape, seed, classes, rows, data):
    k = data.draw(st.integers(3, classes - 1))
    rng = np.random.default_rng(seed)
    width = np.float32(rng.choice([0.1, 1, 3, 8]))
    logits = SHAPES[shape](rng.normal(0, width, (rows, classes)).astype(np.float32))
    labels = rng.integers(0, classes, (rows, 2))
    assert_same_bytes(np.ascontiguousarray(logits, np.float32), labels, k)


@pytest.mark.parametrize("classes", [1000, 21841])
@pytest.mark.parametrize("shape", ["float32", "bfloat16", "probabilities"])
def test_the_bytes_are_the_same_for_as_many_classes_as_imagenet_has(classes, shape):
    rng = np.random.default_rng(classes)
    logits = SHAPES[shape](rng.normal(0, 2, (1_000_000 // classes, classes)).astype(np.float32))
    assert_same_bytes(logits, rng.integers(0, classes, (len(logits), 2)), 50)


def test_no_rows_give_empty_arrays():
    rows = TopKCodec(k=3).encode(np.zeros((0, 2, 6), np.float32), np.zeros((0, 2), np.int64))
    assert {name: values.shape for name, values in rows.items()} == {
        "classes": (0, 2, 3),
        "values": (0, 2, 3),
        **dict.fromkeys(["tail_mean", "tail_var", "tail_max", "tail_lme"], (0, 2)),
    }


def test_few_rows_of_a_bell_are_summed_as_defined(monkeypatch):
    """The bounds are narrow enough that sorting is the exception."""
    sorted_rows = []

    def count(logits, labels, k):
        sorted_rows.append(len(logits))
        return rank_rows(logits, labels, k)

    monkeypatch.setattr("cache_service.format.topk.rank_rows", count)
    logits = np.random.default_rng(0).normal(0, 2, (4000, 1000)).astype(np.float32)
    summarize_rows(logits, np.zeros((4000, 2), np.int64), 32)
    assert sum(sorted_rows) < 40
