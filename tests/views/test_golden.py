"""Pinned draws and pixels: what must not change without a new recipe version.

Draws, and the views of presets that only copy pixels, hold on every machine and for every library
version. The other presets pass through Pillow's resampling and color, so their digests hold for
the Pillow they were recorded with: when they fail alone, Pillow changed pixels, and caches of these
presets that were published before will be refused under it.
"""

from __future__ import annotations

import numpy as np
import pytest

from cache_service.format import recipe
from cache_service.format.recipe import PRESETS
from cache_service.views.auto_augment import RandAugment, TrivialAugment
from cache_service.views.color_ops import ColorJitter, RandomErasing
from cache_service.views.geometry_ops import (
    CenterCrop,
    HorizontalFlip,
    PadCrop,
    RandomAffine,
    RandomResizedCrop,
)
from cache_service.views.identity import digest64, library_versions
from cache_service.views.mixing import Mixer
from cache_service.views.replay import Views

RECORDED_WITH = "pillow 13.0.0, torchvision 0.29.1"

AFFINE = recipe.RandomAffine(degrees=12, translate=0.1, scale=(0.9, 1.1), shear=5)
JITTER = recipe.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, prob=0.8)

OPS = {
    "pad_crop": PadCrop(recipe.PadCrop(), 32),
    "random_resized_crop": RandomResizedCrop(recipe.RandomResizedCrop(), 224),
    "center_crop": CenterCrop(recipe.CenterCrop(), 224),
    "horizontal_flip": HorizontalFlip(recipe.HorizontalFlip(), 32),
    "random_affine": RandomAffine(AFFINE, 32),
    "color_jitter": ColorJitter(JITTER, 32),
    "rand_augment": RandAugment(recipe.RandAugment(), 224),
    "trivial_augment": TrivialAugment(recipe.TrivialAugment(), 32),
    "random_erasing": RandomErasing(recipe.RandomErasing(), 224),
}

# By op: the first columns of samples 0 to 2, then the digest over 1000 samples and all columns.
FIRST_DRAWS = {
    "pad_crop": ([[5, 7], [5, 7], [5, 6]], 12091701782343118813),
    "random_resized_crop": (
        [
            [39871, 81213, 2358280273, 1033600428],
            [45036, 77801, 2975472233, 2469235192],
            [43479, 73215, 1118629948, 1667966545],
        ],
        3884186643941705965,
    ),
    "center_crop": ([[], [], []], 13020603013274838756),
    "horizontal_flip": ([[0], [0], [0]], 6620384982079234725),
    "random_affine": (
        [
            [116921, 156345, 20586, 66959],
            [251644, 125062, 80858, 71652],
            [211038, 80771, -100474, 66909],
        ],
        13161431150038712849,
    ),
    "color_jitter": (
        [[1, 20, 68109, 71229], [1, 19, 75643, 90002], [1, 16, 52977, 71030]],
        13425451131337731378,
    ),
    "rand_augment": (
        [[8, 17695, 7, 17695], [9, 17695, 9, 17695], [8, 17695, 3, 30]],
        1889137115401669555,
    ),
    "trivial_augment": ([[8, 58393], [9, 51905], [8, -45416]], 8578901911425123055),
    "random_erasing": (
        [
            [0, -2347243797310018470, 12586, 85121],
            [0, -3723076643761422745, 15537, 201596],
            [0, -5671042727528106540, 6659, 84345],
        ],
        17810117864413241126,
    ),
}

FIRST_PAIRS = [
    [2, 37444, 100, 107, 224, 224],
    [1, 43764, 0, 0, 0, 0],
    [1, 31213, 0, 0, 0, 0],
    [2, 36781, 72, 140, 220, 224],
]
PAIRS_DIGEST = 13887932484823102008

# Over 40 views of seed 0 at 32 px.
EXACT_ANYWHERE = {
    "cifar": (PRESETS["cifar"], 2510015769183417469),
    "none": (PRESETS["none"], 2830270420483500141),
    "reflect_mixed": (
        (recipe.PadCrop(mode="reflect"), recipe.HorizontalFlip(), recipe.Mixup(), recipe.Cutmix()),
        15712128039537070449,
    ),
    "noise": ((recipe.PadCrop(), recipe.RandomErasing(prob=1, fill="noise")), 7902765292089176397),
}
EXACT_UNDER_ONE_PILLOW = {
    "cifar": (PRESETS["cifar"], 15117075888513102910),
    "imagenet": (PRESETS["imagenet"], 14722935381376157816),
    "deit": (PRESETS["deit"], 4973590784003882025),
    "none": (PRESETS["none"], 16519147460714133184),
    "trivial_augment": ((recipe.PadCrop(), recipe.TrivialAugment()), 14653055990103989311),
    "random_affine": ((recipe.PadCrop(), AFFINE), 521058337238082793),
    "color_jitter": ((recipe.PadCrop(), JITTER), 15036571841526721237),
}


@pytest.mark.parametrize("name", OPS)
def test_the_draws_of_each_op_are_pinned(draw, name):
    first, digest = FIRST_DRAWS[name]
    params = draw(OPS[name], 1000)
    assert params[:3, :4].tolist() == first
    assert digest64(params.astype("<i8").tobytes()) == digest


def test_the_draws_of_pairs_are_pinned(make_recipe):
    pairs = Mixer(make_recipe(preset="deit", size=224)).draw(1, np.arange(1000))
    assert pairs[:4].tolist() == FIRST_PAIRS
    assert digest64(pairs.astype("<i8").tobytes()) == PAIRS_DIGEST


def digest_of(ops, dataset, make_recipe):
    views = Views(make_recipe(*ops), dataset)
    return digest64(views.render(0, range(40)).pixels_BHW3.tobytes())


@pytest.mark.parametrize("name", EXACT_ANYWHERE)
def test_views_that_only_copy_or_mix_pixels_are_the_same_anywhere(synthetic, make_recipe, name):
    ops, digest = EXACT_ANYWHERE[name]
    assert digest_of(ops, synthetic(sizes=((32, 32),)), make_recipe) == digest


@pytest.mark.parametrize("name", EXACT_UNDER_ONE_PILLOW)
def test_views_that_pillow_computes_are_the_recorded_ones(synthetic, make_recipe, name):
    ops, digest = EXACT_UNDER_ONE_PILLOW[name]
    assert digest_of(ops, synthetic(), make_recipe) == digest, (
        f"recorded with {RECORDED_WITH}, rendered with {library_versions()}: if the tests above "
        "pass, the library changed pixels, and caches recorded before will be refused with it"
    )
