"""The identity of a cache: its bounds, in the words that the user reads, and its fingerprint."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from support.caches import make_spec

from cache_service.config import Frozen
from cache_service.format.codecs import Codec
from cache_service.format.spec import CacheSpec

GOOD: dict[str, Any] = make_spec(codec={"kind": "dense"}, num_classes=100).model_dump(mode="json")


def changed(**changes: Any) -> dict[str, Any]:
    """The good document with `a__b` = value for a.b; `...` for a value removes the key."""
    document = CacheSpec.model_validate(GOOD).model_dump(mode="json")
    for path, value in changes.items():
        *parents, last = path.split("__")
        here: Any = document
        for parent in parents:
            here = here[parent]
        if value is ...:
            del here[last]
        else:
            here[last] = value
    return document


TOPK = {"kind": "topk", "k": 5}
ALL = [1, 2, 4]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "Input should be 1"),
        ({"learning_rate": 0.1}, "Extra inputs are not permitted"),
        ({"dataset__name": ...}, "Field required"),
        ({"dataset__num_samples": 0}, "greater than or equal to 1"),
        ({"dataset__num_samples": 2**31}, "less than or equal to 2147483647"),
        ({"dataset__num_classes": 1}, "greater than or equal to 2"),
        ({"dataset__num_classes": 2**24 + 1}, "less than or equal to 16777216"),
        ({"dataset__num_classes": 101}, "the dataset has 101 classes, the teacher only 100"),
        ({"dataset__sha256": "latest"}, "should match pattern"),
        ({"dataset__sha256": "A" * 64}, "should match pattern"),
        ({"dataset__root": "/data"}, "Extra inputs are not permitted"),
        ({"recipe__version": 2}, "Input should be 1"),
        ({"recipe__size": 7}, "greater than or equal to 8"),
        ({"teacher__weights_sha256": "a" * 63}, "should match pattern"),
        ({"teacher__num_classes": 1}, "greater than or equal to 2"),
        ({"teacher__num_classes": 2**24 + 1}, "less than or equal to 16777216"),
        ({"teacher__precision": "int8"}, "Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"teacher__pooling": "max"}, "Input should be 'direct' or 'chained'"),
        ({"teacher__map_side": 0}, "greater than or equal to 1"),
        ({"teacher__preprocess__size": 7}, "greater than or equal to 8"),
        ({"teacher__preprocess__size": 4097}, "less than or equal to 4096"),
        ({"teacher__preprocess__std": [0.2, 0, 0.2]}, "greater than 0"),
        ({"teacher__preprocess__std": [0.2, 0.2]}, "mean has 3 numbers and std 2"),
        ({"teacher__preprocess__mean": [0.5] * 4}, "mean has 4 numbers and std 3"),
        ({"teacher__preprocess__mean": [0.5, 0.5, float("nan")]}, "should be a finite number"),
        ({"teacher__preprocess__interpolation": "nearest"}, "'bilinear' or 'bicubic'"),
        ({"scales": []}, "at least 1 item"),
        ({"scales": [2, 4]}, "scales must start at 1 and strictly increase"),
        ({"scales": [1, 4, 2]}, "strictly increase, got .1, 4, 2.: cell 0 is the whole image"),
        ({"scales": [1, 2, 2]}, "strictly increase"),
        ({"scales": [0, 1]}, "greater than or equal to 1"),
        ({"scales": [1, 65]}, "less than or equal to 64"),
        ({"stored_scales": [2]}, "stored_scales=.2. must be all scales, or the finest one"),
        ({"stored_scales": [1, 4]}, "must be all scales, or the finest one"),
        ({"stored_scales": [4], "teacher__affine_head": False}, "where the others follow from it"),
        ({"stored_scales": [4], "teacher__map_side": 7}, "where the others follow from it"),
        ({"stored_scales": [4], "scales": [1, 3, 4]}, "sides that divide it"),
        ({"codec": {"kind": "zip"}}, "does not match any of the expected tags"),
        ({"codec": {"kind": "dense", "compression": "gzip"}}, "Input should be 'none' or 'zstd'"),
        ({"codec": {"kind": "dense", "k": 3}}, "Extra inputs are not permitted"),
        ({"codec": {"kind": "topk"}}, "Field required"),
        ({"codec": TOPK | {"k": 2}, "stored_scales": ALL}, "greater than or equal to 3"),
        (
            {"codec": TOPK | {"k": 100}, "stored_scales": ALL},
            "codec.k=100 is not below num_classes=100; use `codec: .kind: dense.` to keep every",
        ),
        ({"codec": TOPK}, "topk keeps other classes in every cell, so it must store all scales"),
        ({"codec": {"kind": "features"}}, "codec.num_channels is not known"),
        ({"codec": {"kind": "features", "num_channels": 6, "bits": 4}}, "Input should be 8 or 16"),
        ({"codec": {"kind": "features", "num_channels": 0}}, "greater than or equal to 1"),
        ({"codec": {"kind": "features", "num_channels": 2**20 + 1}}, "less than or equal to 104"),
        ({"layout__shard_rows": 31}, "must be even"),
        ({"layout__chunk_rows": 5}, "must divide"),
    ],
)
def test_every_bound_is_enforced_and_says_why(change, says):
    with pytest.raises(ValidationError, match=says):
        CacheSpec.model_validate(changed(**change))


# One legal change of every field of every model in a spec. A field that is added without a line
# here fails the walk below, so nobody forgets to ask whether it belongs to the identity.
OTHER = {
    "format": None,  # has one legal value only
    "dataset.name": {"dataset__name": "toys"},
    "dataset.split": {"dataset__split": "val"},
    "dataset.num_samples": {"dataset__num_samples": 101},
    "dataset.num_classes": {"dataset__num_classes": 99},
    "dataset.sha256": {"dataset__sha256": "e" * 64},
    "recipe.version": None,
    "recipe.size": {"recipe__size": 9},
    "recipe.ops": {"recipe__ops": [{"op": "pad_crop"}]},
    "recipe.callable": {"recipe__callable": "mine:make", "recipe__ops": []},
    "recipe.repeats": {"recipe__repeats": 2},
    "teacher.model": {"teacher__model": "toy2"},
    "teacher.weights_sha256": {"teacher__weights_sha256": "b" * 64},
    "teacher.num_classes": {"teacher__num_classes": 101},
    "teacher.preprocess.size": {"teacher__preprocess__size": 9},
    "teacher.preprocess.mean": {"teacher__preprocess__mean": [0.5, 0.5, 0.51]},
    "teacher.preprocess.std": {"teacher__preprocess__std": [0.2, 0.2, 0.21]},
    "teacher.preprocess.interpolation": {"teacher__preprocess__interpolation": "bicubic"},
    "teacher.precision": {"teacher__precision": "bfloat16"},
    "teacher.map_side": {"teacher__map_side": 4},
    "teacher.affine_head": {"teacher__affine_head": False, "stored_scales": ALL},
    "teacher.pooling": {"teacher__pooling": "chained"},
    "teacher.classes": {"teacher__classes": list(range(100))},
    "teacher.output": {"teacher__output": "logits"},
    "teacher.answers": {"teacher__answers": "probabilities"},
    "teacher.feature_map": {"teacher__feature_map": "layer4"},
    "scales": {"scales": [1, 4]},
    "stored_scales": {"stored_scales": ALL},
    "codec.kind": {"codec__kind": "int8"},
    "codec.compression": {"codec__compression": "zstd"},
    "codec.k": {"codec": TOPK | {"k": 6}, "stored_scales": ALL},
    "codec.packed": {"codec": TOPK | {"packed": True}, "stored_scales": ALL},
    "codec.num_channels": {"codec": {"kind": "features", "num_channels": 7}},
    "codec.bits": {"codec": {"kind": "features", "num_channels": 6, "bits": 8}},
    "layout.shard_rows": {"layout__shard_rows": 64},
    "layout.chunk_rows": {"layout__chunk_rows": 16},
}

BASES = {
    "codec.k": {"codec": TOPK, "stored_scales": ALL},
    "codec.packed": {"codec": TOPK, "stored_scales": ALL},
    "codec.num_channels": {"codec": {"kind": "features", "num_channels": 6}},
    "codec.bits": {"codec": {"kind": "features", "num_channels": 6}},
}
"""Where a field exists in one codec only: the spec to change it in."""


def leaves(model: type[BaseModel], path: str = "") -> set[str]:
    """Dotted names of all fields below a model; of a codec, those of every kind."""
    found: set[str] = set()
    for name, field in model.model_fields.items():
        kind = field.annotation
        nested = [
            k for k in (kind, *get_args(kind)) if isinstance(k, type) and issubclass(k, Frozen)
        ]
        if nested:
            found |= set().union(*(leaves(each, f"{path}{name}.") for each in nested))
        else:
            found.add(f"{path}{name}")
    return found


def test_every_field_of_a_spec_has_a_case_here():
    assert leaves(CacheSpec) == set(OTHER)
    assert {
        f"codec.{name}" for kind in get_args(get_args(Codec)[0]) for name in kind.model_fields
    } == {name for name in OTHER if name.startswith("codec.")}


@pytest.mark.parametrize("field", [name for name, change in OTHER.items() if change])
def test_every_field_changes_the_fingerprint(field):
    base = CacheSpec.model_validate(changed(**BASES.get(field, {})))
    other = CacheSpec.model_validate(changed(**OTHER[field]))
    assert other.fingerprint != base.fingerprint


def test_a_fingerprint_does_not_depend_on_how_the_spec_was_written():
    spec = CacheSpec.model_validate(GOOD)
    again = CacheSpec.model_validate_json(spec.model_dump_json())
    assert again.fingerprint == spec.fingerprint == make_spec(num_classes=100).fingerprint


def test_a_known_spec_keeps_its_fingerprint():
    # If this fails, every published cache is orphaned: undo the change, or raise FORMAT_VERSION.
    assert CacheSpec.model_validate(GOOD).fingerprint == (
        "2b92affedac74af35c173301c656b87f670e4f0d4a40d1854787aded1026f7e4"
    )


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="Instance is frozen"):
        CacheSpec.model_validate(GOOD).scales = (1,)


def test_shards_cover_every_position_once_and_the_last_may_be_short():
    spec = make_spec(num_samples=100, shard_rows=32)
    ranges = [spec.shard_range(shard) for shard in range(spec.num_shards)]
    assert ranges == [(0, 32), (32, 64), (64, 96), (96, 100)]
