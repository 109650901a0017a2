"""A recipe says what it does, within bounds that it explains."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from cache_service.format.canonical import canonical_json
from cache_service.format.recipe import PRESETS, AugmentConfig, Cutmix, Mixup, Op, Recipe

FRAME = {"op": "pad_crop"}
NO_FRAME = "must start with pad_crop, random_resized_crop or center_crop: the first op makes"


@pytest.mark.parametrize(
    ("op", "says"),
    [
        ({"op": "blur"}, "does not match any of the expected tags"),
        ({"op": "horizontal_flip", "p": 0.5}, "Extra inputs are not permitted"),
        ({"op": "pad_crop", "padding": -1}, "greater than or equal to 0"),
        ({"op": "pad_crop", "padding": 1025}, "less than or equal to 1024"),
        ({"op": "pad_crop", "mode": "edge"}, "Input should be 'constant' or 'reflect'"),
        ({"op": "random_resized_crop", "area": (0, 1)}, "greater than 0"),
        ({"op": "random_resized_crop", "area": (0.5, 1.1)}, "less than or equal to 1"),
        ({"op": "random_resized_crop", "area": (0.5, 0.4)}, "area runs from 0.5 down to 0.4"),
        ({"op": "random_resized_crop", "area": (0.5,)}, "Field required"),
        ({"op": "random_resized_crop", "ratio": (0.009, 1)}, "greater than or equal to 0.01"),
        ({"op": "random_resized_crop", "ratio": (1, 101)}, "less than or equal to 100"),
        ({"op": "random_resized_crop", "ratio": (2, 1)}, "ratio runs from 2.0 down to 1.0"),
        ({"op": "random_resized_crop", "ratio": (1, float("inf"))}, "should be a finite number"),
        ({"op": "random_resized_crop", "interpolation": "lanczos"}, "'bilinear' or 'bicubic'"),
        ({"op": "center_crop", "crop_pct": 0.09}, "greater than or equal to 0.1"),
        ({"op": "center_crop", "crop_pct": 1.01}, "less than or equal to 1"),
        ({"op": "center_crop", "interpolation": "box"}, "'bilinear' or 'bicubic'"),
        ({"op": "horizontal_flip", "prob": -0.1}, "greater than or equal to 0"),
        ({"op": "horizontal_flip", "prob": 1.1}, "less than or equal to 1"),
        ({"op": "horizontal_flip", "prob": float("nan")}, "should be a finite number"),
        *(
            ({"op": "random_affine", name: bad}, says)
            for name, bad, says in (
                ("degrees", -1, "greater than or equal to 0"),
                ("degrees", 181, "less than or equal to 180"),
                ("translate", -0.1, "greater than or equal to 0"),
                ("translate", 1.1, "less than or equal to 1"),
                ("scale", (0.09, 1), "greater than or equal to 0.1"),
                ("scale", (1, 11), "less than or equal to 10"),
                ("scale", (1.1, 0.9), "random_affine.scale runs from 1.1 down to 0.9"),
                ("shear", -1, "greater than or equal to 0"),
                ("shear", 61, "less than or equal to 60"),
            )
        ),
        *(
            ({"op": "color_jitter", name: bad}, says)
            for name, high in (
                *(("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0.5)),
                ("prob", 1),
            )
            for bad, says in (
                (-0.1, "greater than or equal to 0"),
                (high + 0.1, f"less than or equal to {high}"),
            )
        ),
        ({"op": "rand_augment", "num_ops": 0}, "greater than or equal to 1"),
        ({"op": "rand_augment", "num_ops": 9}, "less than or equal to 8"),
        ({"op": "rand_augment", "magnitude": -1}, "greater than or equal to 0"),
        ({"op": "rand_augment", "magnitude": 31}, "less than or equal to 30"),
        ({"op": "trivial_augment", "magnitude": 3}, "Extra inputs are not permitted"),
        ({"op": "random_erasing", "prob": -1}, "greater than or equal to 0"),
        ({"op": "random_erasing", "prob": 2}, "less than or equal to 1"),
        ({"op": "random_erasing", "area": (0, 0.3)}, "greater than 0"),
        ({"op": "random_erasing", "area": (0.3, 1.1)}, "less than or equal to 1"),
        ({"op": "random_erasing", "area": (0.4, 0.3)}, "random_erasing.area runs from 0.4 down"),
        ({"op": "random_erasing", "ratio": (0, 1)}, "greater than or equal to 0.01"),
        ({"op": "random_erasing", "ratio": (1, 200)}, "less than or equal to 100"),
        ({"op": "random_erasing", "ratio": (3, 2)}, "random_erasing.ratio runs from 3.0 down"),
        ({"op": "random_erasing", "fill": "black"}, "Input should be 'mean' or 'noise'"),
        *(
            ({"op": op, name: bad}, says)
            for op in ("mixup", "cutmix")
            for name, bad, says in (
                ("alpha", 0, "greater than 0"),
                ("alpha", 33, "less than or equal to 32"),
                ("prob", -0.1, "greater than or equal to 0"),
                ("prob", 1.1, "less than or equal to 1"),
            )
        ),
    ],
)
def test_every_bound_of_an_op_is_enforced_and_says_why(op, says):
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(Op).validate_python(op)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"size": 7, "preset": "none"}, "greater than or equal to 8"),
        ({"size": 4097, "preset": "none"}, "less than or equal to 4096"),
        ({"size": 32, "preset": "mnist"}, "Input should be 'cifar', 'imagenet', 'deit' or 'none'"),
        ({"size": 32, "preset": "none", "crop": 3}, "Extra inputs are not permitted"),
        ({"size": 32}, "augment takes one of preset, ops, callable; got none"),
        ({"size": 32, "preset": "none", "ops": [FRAME]}, "got preset and ops"),
        ({"size": 32, "ops": [FRAME], "callable": "a:b"}, "got ops and callable"),
        ({"size": 32, "callable": "mine"}, "should match pattern"),
        ({"size": 32, "callable": "a:b:c"}, "should match pattern"),
        ({"size": 32, "ops": []}, NO_FRAME),
        ({"size": 32, "ops": [{"op": "horizontal_flip"}]}, NO_FRAME),
        ({"size": 32, "ops": [FRAME, {"op": "center_crop"}]}, "second framing op, center_crop"),
        (
            {"size": 32, "ops": [FRAME, {"op": "mixup"}, {"op": "horizontal_flip"}]},
            "augment.ops has horizontal_flip after mixup: mixing is last",
        ),
        ({"size": 32, "ops": [FRAME, {"op": "mixup"}, {"op": "mixup"}]}, "names mixup twice"),
    ],
)
def test_every_bound_of_augment_is_enforced_and_says_why(settings, says):
    with pytest.raises(ValidationError, match=says):
        AugmentConfig.model_validate(settings)


def test_a_recipe_takes_ops_or_a_callable_not_both():
    with pytest.raises(ValidationError, match="takes `ops` or `callable`, not both"):
        Recipe.model_validate({"size": 32, "ops": [FRAME], "callable": "a:b"})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_and_its_ops_written_out_are_one_recipe(preset):
    written = [op.model_dump() for op in PRESETS[preset]]
    short = AugmentConfig(size=32, preset=preset).recipe()
    assert short == AugmentConfig.model_validate({"size": 32, "ops": written}).recipe()
    assert Recipe.model_validate_json(short.model_dump_json()) == short


def test_every_preset_there_is_can_be_asked_for():
    assert set(PRESETS) == set(
        get_args(get_args(AugmentConfig.model_fields["preset"].annotation)[0])
    )


def test_mixing_ops_are_those_that_need_a_partner():
    kinds = [type(op) for op in AugmentConfig(size=224, preset="deit").recipe().mixing]
    assert kinds == [Mixup, Cutmix]
    assert AugmentConfig(size=32, preset="cifar").recipe().mixing == ()


def test_the_defaults_of_a_preset_stay_what_they_are():
    # They are stored in every cache: a changed default would orphan what is published.
    recipe = AugmentConfig(size=32, preset="cifar").recipe()
    assert canonical_json(recipe.model_dump(mode="json")) == (
        b'{"callable":null,"ops":[{"mode":"constant","op":"pad_crop","padding":4},'
        b'{"op":"horizontal_flip","prob":0.5}],"size":32,"version":1}'
    )


def test_repeats_of_one_are_absent_so_that_recipes_of_earlier_caches_stay_equal():
    plain = AugmentConfig(size=32, preset="cifar").recipe()
    assert "repeats" not in plain.model_dump(mode="json")
    assert "repeats" not in plain.model_dump_json()
    assert AugmentConfig(size=32, preset="cifar", repeats=1).recipe() == plain
    repeated = AugmentConfig(size=32, preset="cifar", repeats=4).recipe()
    assert repeated != plain
    assert repeated.model_dump(mode="json") == plain.model_dump(mode="json") | {"repeats": 4}
    assert Recipe.model_validate_json(repeated.model_dump_json()) == repeated
    by_code = AugmentConfig(size=32, callable="m:f", repeats=2).recipe()
    assert (by_code.callable, by_code.repeats) == ("m:f", 2)


@pytest.mark.parametrize(("bad", "says"), [(0, "greater than or equal to 1"), (65, "equal to 64")])
def test_repeats_are_bounded(bad, says):
    for kind in (AugmentConfig, Recipe):
        with pytest.raises(ValidationError, match=says):
            kind.model_validate({"size": 32, "ops": [{"op": "pad_crop"}], "repeats": bad})
