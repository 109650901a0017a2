"""A view is a pure function of recipe, dataset, seed and position."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache_service.errors import ConfigError, DatasetError
from cache_service.format.recipe import HorizontalFlip, PadCrop
from cache_service.views.identity import digest64
from cache_service.views.order import epoch_order
from cache_service.views.replay import ViewBatch, Views

PRESETS = ["cifar", "imagenet", "deit", "none"]


@pytest.fixture(params=PRESETS)
def views(request, synthetic, make_recipe):
    return Views(make_recipe(preset=request.param), synthetic(num_samples=65))


def assert_same(left, right):
    for name, one, other in zip(ViewBatch._fields, left, right, strict=True):
        assert one.dtype == other.dtype, name
        np.testing.assert_array_equal(one, other, err_msg=name)


def joined(batches):
    return ViewBatch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_views_are_identical_at_every_batch_size(views, batch_size):
    whole = views.render(3, range(65))
    parts = [
        views.render(3, range(start, min(start + batch_size, 65)))
        for start in range(0, 65, batch_size)
    ]
    assert_same(joined(parts), whole)


def test_views_are_identical_in_any_order_and_repeated(views):
    positions = np.array([64, 3, 3, 0, 17, 2, 64])
    whole = views.render(3, range(65))
    assert_same(views.render(3, positions), ViewBatch(*(array[positions] for array in whole)))


def test_no_positions_give_an_empty_batch(views):
    batch = views.render(0, np.array([], dtype=np.int64))
    assert batch.pixels_BHW3.shape == (0, 32, 32, 3)
    assert [len(array) for array in batch] == [0] * 6


def test_a_batch_is_typed_as_declared(views):
    batch = views.render(0, range(5))
    assert batch.pixels_BHW3.shape == (5, 32, 32, 3)
    dtypes = [np.uint8, np.uint64, np.uint64, np.int32, np.int32, np.float32]
    assert [array.dtype for array in batch] == dtypes


def test_views_survive_pickling_and_travel_light(views):
    wire = pickle.dumps(views)
    assert len(wire) < 4000
    assert_same(pickle.loads(wire).render(5, range(9)), views.render(5, range(9)))


def test_another_process_renders_the_same_bytes(synthetic, make_recipe):
    # 5 s, nearly all of it a fresh interpreter importing torchvision.
    recipes = [make_recipe(preset=preset) for preset in PRESETS]
    digests = [Views(r, synthetic()).render(6, range(40)).digests_B.tolist() for r in recipes]
    script = (
        "import sys; from cache_service.plugins import load_object;"
        "from cache_service.format.recipe import Recipe;"
        "from cache_service.views.replay import Views;"
        "images = load_object(sys.argv[1])();"
        "recipes = [Recipe.model_validate_json(text) for text in sys.argv[2:]];"
        "digests = [Views(r, images).render(6, range(40)).digests_B.tolist() for r in recipes];"
        "sys.stdout.write(repr(digests))"
    )
    images = f"{Path(__file__).parent / 'synthetic.py'}:SyntheticImages"
    answer = subprocess.run(
        [sys.executable, "-c", script, images, *(r.model_dump_json() for r in recipes)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == repr(digests)


def test_every_image_is_decoded_once_per_batch(synthetic, make_recipe):
    dataset = synthetic(num_samples=64)
    views = Views(make_recipe(preset="deit"), dataset)
    views.render(0, range(64))
    assert dataset.num_decoded == 64
    views.render(0, [5, 8])  # partners at 4 and 9
    assert dataset.num_decoded == 64 + 4


def test_seeds_give_other_orders_and_other_draws(views):
    one, two = views.render(0, range(65)), views.render(1, range(65))
    assert (one.samples_B != two.samples_B).any()
    same_sample = np.argsort(one.samples_B), np.argsort(two.samples_B)
    if views.recipe.ops[0].op != "center_crop":
        assert (one.digests_B[same_sample[0]] != two.digests_B[same_sample[1]]).mean() > 0.5


def test_samples_follow_the_seeds_order(views):
    np.testing.assert_array_equal(views.render(9, range(65)).samples_B, epoch_order(65, 9))


def test_digests_are_of_the_pixels(views):
    batch = views.render(0, range(5))
    assert batch.digests_B.tolist() == [digest64(p.tobytes()) for p in batch.pixels_BHW3]


def test_a_recipe_with_one_more_op_keeps_the_draws_of_the_ones_before(synthetic, make_recipe):
    dataset = synthetic(sizes=((32, 32),))
    short = Views(make_recipe(PadCrop()), dataset).render(0, range(40))
    longer = Views(make_recipe(PadCrop(), HorizontalFlip()), dataset).render(0, range(40))
    unflipped = (short.pixels_BHW3 == longer.pixels_BHW3).all(axis=(1, 2, 3))
    mirrored = (short.pixels_BHW3[:, :, ::-1] == longer.pixels_BHW3).all(axis=(1, 2, 3))
    assert (unflipped | mirrored).all()
    assert unflipped.any()
    assert mirrored.any()


def test_origins_ignore_how_views_are_rendered_and_notice_everything_else(
    synthetic, make_recipe, monkeypatch
):
    """An unequal digest under an equal origin must mean: only the rendering changed."""
    recipe = make_recipe(preset="deit")
    before = Views(recipe, synthetic()).render(0, range(40))

    rounded = Views(recipe, synthetic())
    plain = rounded._renderer.pixels
    monkeypatch.setattr(rounded._renderer, "pixels", lambda image, params: plain(image, params) ^ 1)
    after = rounded.render(0, range(40))
    np.testing.assert_array_equal(after.origins_B, before.origins_B)
    assert (after.digests_B != before.digests_B).all()

    class OnePixelOff(synthetic):
        def image(self, sample):
            image = super().image(sample)
            if sample == 7:
                image.putpixel((0, 0), (1, 2, 3))
            return image

    other = Views(recipe, OnePixelOff()).render(0, range(40))
    touched = (before.samples_B == 7) | (before.partners_B == 7)
    np.testing.assert_array_equal(other.origins_B != before.origins_B, touched)

    def flipped(prob):
        ops = PadCrop(), HorizontalFlip(prob=prob)
        return Views(make_recipe(*ops), synthetic()).render(0, range(40)).origins_B

    assert (flipped(0.0) != flipped(1.0)).all()


@pytest.mark.parametrize("preset", ["imagenet", "deit"])
def test_origins_are_left_out_on_request_and_change_nothing_else(synthetic, make_recipe, preset):
    whole = Views(make_recipe(preset=preset), synthetic()).render(1, range(40))
    views = Views(make_recipe(preset=preset), synthetic())
    quick = views.render(1, range(40), with_origins=False)
    assert_same(quick, whole._replace(origins_B=np.zeros(0, np.uint64)))
    assert_same(views.render(1, range(40)), whole)


def test_members_of_a_pair_have_origins_of_their_own(synthetic, make_recipe):
    batch = Views(make_recipe(preset="deit"), synthetic()).render(0, range(40))
    assert len(np.unique(batch.origins_B)) == 40


@pytest.mark.parametrize("position", [-1, 40, 10**12])
def test_a_position_outside_the_seed_is_refused(synthetic, make_recipe, position):
    views = Views(make_recipe(preset="cifar"), synthetic())
    with pytest.raises(ConfigError, match=rf"position {position} .* 0 to 39"):
        views.render(0, [3, position])


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_outside_64_bits_is_refused(synthetic, make_recipe, seed):
    with pytest.raises(ConfigError, match=f"seed {seed}"):
        Views(make_recipe(preset="cifar"), synthetic()).render(seed, [0])


def test_an_image_that_is_not_rgb_is_refused(make_recipe):
    class Gray:
        def __len__(self):
            return 2

        def image(self, sample):
            return Image.new("L", (32, 32))

    with pytest.raises(DatasetError, match=r"sample \d came as a L image"):
        Views(make_recipe(preset="cifar"), Gray()).render(0, [0, 1])


def test_rendering_leaves_the_global_generators_alone(views):
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    views.render(0, range(4))
    assert np.random.rand() == expected


class JpegFiles:
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def image(self, sample):
        with Image.open(self.paths[sample]) as image:
            return image.convert("RGB")


@pytest.mark.parametrize("preset", PRESETS)
def test_real_photographs_replay_exactly(real_jpegs, make_recipe, preset):
    # Eight of them: the presets at 224 px take 4 ms a view.
    views = Views(make_recipe(preset=preset, size=224), JpegFiles(real_jpegs[::8]))
    whole = views.render(1, range(len(views.dataset)))
    again = joined([views.render(1, [position]) for position in range(len(views.dataset))])
    assert_same(again, whole)
    assert whole.pixels_BHW3.std(axis=(1, 2, 3)).min() > 5
