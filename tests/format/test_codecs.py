"""What each codec keeps, to which error, and what it will not take."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.caches import answers, labels, make_head, make_spec

from cache_service.errors import NonFiniteError
from cache_service.format.codecs import (
    FLOAT16_MAX,
    ArrayMath,
    Decoding,
    DenseCodec,
    FeaturesCodec,
    Int8Codec,
    TopKCodec,
)
from cache_service.format.layout import CacheLayout

CODECS = {
    "dense": DenseCodec(),
    "int8": Int8Codec(),
    "topk": TopKCodec(k=3),
    "topk packed": TopKCodec(k=3, packed=True),
    "features": FeaturesCodec(num_channels=6),
    "features in 8 bits": FeaturesCodec(num_channels=6, bits=8),
}

LOGITS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=3, max_dims=3, max_side=6),
    elements=st.floats(-60000, 60000, width=32, allow_subnormal=False),
)


def own(count: int, width: int = 1) -> np.ndarray:
    return np.zeros((count, width), np.int64)


def rounded(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).astype(np.float32)


# --- dense -----------------------------------------------------------------------------------


@given(LOGITS)
def test_dense_keeps_every_logit_to_float16(logits):
    rows = DenseCodec().encode(logits, own(len(logits)))
    back = make_spec().decode(rows, head=None)
    assert back.dtype == np.float32
    np.testing.assert_array_equal(back, rounded(logits))


# --- int8 ------------------------------------------------------------------------------------


@given(LOGITS)
def test_int8_is_off_by_half_a_level_at_most(logits):
    rows = Int8Codec().encode(logits, own(len(logits)))
    back = make_spec(codec={"kind": "int8"}).decode(rows, head=None)
    # Beside the rounding to a level, float32 itself rounds the product and the sum.
    slack = 4 * np.spacing(np.abs(logits).max(axis=-1, keepdims=True))
    assert (np.abs(back - logits) <= rows["scale"][..., None] * 0.5 + slack).all()


@given(st.floats(-60000, 60000, width=32), st.integers(2, 9))
def test_int8_keeps_a_cell_whose_classes_all_agree_exactly(value, classes):
    logits = np.full((2, 3, classes), value, np.float32)
    rows = Int8Codec().encode(logits, own(2))
    assert (rows["scale"] == 0).all()
    np.testing.assert_array_equal(make_spec(codec={"kind": "int8"}).decode(rows, head=None), logits)


def test_int8_uses_all_256_levels_of_each_cell():
    logits = np.linspace(-7, 9, 256, dtype=np.float32).reshape(1, 1, 256)
    assert Int8Codec().encode(logits, own(1))["logits"].tolist() == [[list(range(256))]]


# --- topk ------------------------------------------------------------------------------------


@given(LOGITS.filter(lambda z: z.shape[-1] > 3), st.data())
def test_topk_keeps_the_labels_always_and_the_largest_beside_them(logits, data):
    batch, _, classes = logits.shape
    kept = np.array(
        data.draw(
            st.lists(st.tuples(*[st.integers(0, classes - 1)] * 2), min_size=batch, max_size=batch)
        )
    )
    rows = TopKCodec(k=3).encode(logits, kept)
    assert (np.diff(rows["classes"].astype(int), axis=-1) > 0).all(), "ascending, without repeats"
    for b, r in np.ndindex(logits.shape[:2]):
        classes_K = rows["classes"][b, r].tolist()
        assert set(kept[b].tolist()) <= set(classes_K)
        np.testing.assert_array_equal(rows["values"][b, r], logits[b, r, classes_K].astype("f2"))
        dropped = np.delete(logits[b, r], classes_K)
        free = [c for c in classes_K if c not in kept[b]]
        assert not free or logits[b, r, free].min() >= dropped.max()


@given(LOGITS.filter(lambda z: z.shape[-1] > 3), st.sampled_from([1.0, 2.0, 4.0, 20.0]))
def test_topk_never_gives_a_dropped_class_more_than_the_largest_of_them(logits, temperature):
    spec = make_spec(codec={"kind": "topk", "k": 3}, num_classes=logits.shape[-1])
    rows = spec.codec.encode(logits, own(len(logits)))
    back = spec.decode(rows, temperature=temperature, head=None)
    dropped = np.ones(back.shape, bool)
    np.put_along_axis(dropped, rows["classes"].astype(int), False, axis=-1)
    limit = np.broadcast_to(rows["tail_max"][..., None], back.shape)
    assert (back[dropped] <= limit[dropped]).all()


def test_topk_stores_class_numbers_in_the_smallest_type_that_holds_them():
    for classes, dtype in ((65536, np.uint16), (65537, np.uint32)):
        logits = np.zeros((1, 1, classes), np.float32)
        logits[0, 0, -1] = 5
        rows = TopKCodec(k=3).encode(logits, own(1))
        assert rows["classes"].dtype == dtype
        assert rows["classes"][0, 0].tolist() == [0, 1, classes - 1]


@given(
    LOGITS.filter(lambda z: z.shape[-1] > 3),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.5, 1, 4]),
)
def test_packed_rows_keep_the_same_classes_and_their_logits_to_half_a_level(
    logits, seed, temperature
):
    kept = np.random.default_rng(seed).integers(0, logits.shape[-1], (len(logits), 2))
    plain, packed = TopKCodec(k=3), TopKCodec(k=3, packed=True)
    rows, small = plain.encode(logits, kept), packed.encode(logits, kept)
    found = packed.decode(small, Decoding(ArrayMath(), logits.shape[-1], 1.0))
    where = rows["classes"].astype(int)
    off = np.abs(np.take_along_axis(found, where, -1) - np.take_along_axis(logits, where, -1))
    edges = np.stack([rows["values"].min(-1), rows["values"].max(-1)]).astype(np.float64)
    # Half a level, and what float16 takes from the ends of the range.
    bound = (edges[1] - edges[0]) / 255 / 2 + 2e-3 * np.abs(edges).max(0) + 1e-6
    assert (off <= bound[..., None]).all()


@pytest.mark.parametrize("classes", [255, 256, 257, 1000, 21841])
def test_packed_classes_are_found_again_in_every_block(classes):
    logits = np.random.default_rng(0).normal(size=(40, 2, classes)).astype(np.float32)
    kept = np.stack([np.zeros(40, int), np.full(40, classes - 1)], 1)
    rows = TopKCodec(k=200).encode(logits, kept)
    packed = TopKCodec(k=200, packed=True)
    ranks = np.broadcast_to(np.arange(classes, dtype=np.float32), logits.shape)
    np.testing.assert_array_equal(
        packed.kept_logits(packed.encode(logits, kept), ranks), rows["classes"]
    )


@pytest.mark.parametrize("classes", [100, 1000])
def test_a_packed_row_takes_about_half_the_bytes(classes):
    sizes = [
        sum(array.row_bytes for array in TopKCodec(k=24, packed=packed).arrays(1, classes))
        for packed in (False, True)
    ]
    assert sizes == [4 * 24 + 16, 2 * 24 + 12 + -(-classes // 256)]


def test_packed_rows_take_255_classes_at_most():
    TopKCodec(k=255, packed=True).check(1000)
    with pytest.raises(ValueError, match=r"codec\.k=256 is too large for codec\.packed"):
        TopKCodec(k=256, packed=True).check(1000)
    TopKCodec(k=256).check(1000)


@pytest.mark.parametrize("kind", ["topk packed", "features in 8 bits"])
def test_torch_decodes_as_numpy_does(kind):
    torch = pytest.importorskip("torch")
    targets = pytest.importorskip("distill.targets")
    codec = CODECS[kind]
    answer = np.random.default_rng(0).normal(0, 3, (8, 2, 6)).astype(np.float32)
    rows = codec.encode(answer, own(8))
    wanted = codec.decode(rows, Decoding(ArrayMath(), 6, 4.0))
    tensors = targets.tensors_of(rows, list(rows))
    found = codec.decode(tensors, Decoding(targets.TorchMath(), 6, 4.0))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)


def test_codecs_that_were_there_before_have_the_documents_that_they_had():
    assert TopKCodec(k=3).model_dump() == {"compression": "none", "kind": "topk", "k": 3}
    assert FeaturesCodec(num_channels=6).model_dump() == {
        "compression": "none",
        "kind": "features",
        "num_channels": 6,
    }
    assert TopKCodec(k=3, packed=True).model_dump()["packed"] is True
    assert FeaturesCodec(num_channels=6, bits=8).model_dump()["bits"] == 8


# --- features --------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_features_give_the_heads_answer_to_float16_features(seed):
    spec = make_spec(codec={"kind": "features", "num_channels": 6})
    head = make_head(spec)
    features = np.random.default_rng(seed).normal(size=(4, 16, 6)).astype(np.float32)
    back = spec.decode(spec.codec.encode(features, own(4)), head=head)
    wanted = rounded(features) @ head.weight_CD.T + head.bias_C
    np.testing.assert_array_equal(back, wanted)


@given(LOGITS)
def test_features_in_8_bits_are_off_by_half_a_level_at_most(features):
    codec = FeaturesCodec(num_channels=features.shape[-1], bits=8)
    rows = codec.encode(features, own(len(features)))
    back = codec.decode(rows, Decoding(ArrayMath(), 2, 1.0))
    slack = 4 * np.spacing(np.abs(features).max(axis=-1, keepdims=True))
    assert (np.abs(back - features) <= rows["scale"][..., None] * 0.5 + slack).all()


# --- all -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65505.0, -1e30])
def test_what_float16_cannot_hold_is_refused_and_the_rows_are_named(codec, bad):
    answer = np.zeros((12, 2, 6), np.float32)
    answer[7, 1, 3] = answer[11, 0, 0] = bad
    with pytest.raises(NonFiniteError, match=r"for 2 of 12 views \(rows \[7, 11\] of the batch\)"):
        codec.encode(answer, own(12))


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
def test_the_largest_float16_is_taken(codec):
    answer = np.zeros((2, 1, 6), np.float32)
    answer[0, 0, 0], answer[1, 0, 5] = FLOAT16_MAX, -FLOAT16_MAX
    rows = codec.encode(answer, own(2))
    assert all(np.isfinite(values).all() for values in rows.values())


@pytest.mark.parametrize("kind", CODECS)
def test_encoding_a_row_does_not_depend_on_the_batch_around_it(kind):
    spec = make_spec(codec=CODECS[kind].model_dump())
    answer, kept = answers(spec, 3), labels(spec)[:, None]
    whole = spec.codec.encode(answer, kept)
    for start in (0, 41, 99):
        alone = spec.codec.encode(answer[start : start + 1], kept[start : start + 1])
        for name, values in alone.items():
            np.testing.assert_array_equal(values[0], whole[name][start])


@pytest.mark.parametrize("kind", CODECS)
def test_encoded_arrays_are_those_of_the_layout(kind):
    spec = make_spec(codec=CODECS[kind].model_dump())
    rows = spec.codec.encode(answers(spec, 0), labels(spec)[:, None])
    declared = {array.name: array for array in CacheLayout(spec).arrays[3:]}
    assert rows.keys() == declared.keys()
    for name, values in rows.items():
        assert values.dtype == declared[name].dtype
        assert values.shape[1:] == declared[name].row_shape
