"""With repeats, one decode serves several views, and every view is one of a recipe without them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cache_service.format.recipe import AugmentConfig, Recipe
from cache_service.views.decoded import BYTES_PER_PIXEL, DecodedImages
from cache_service.views.order import draw_seeds
from cache_service.views.replay import ViewBatch, Views

IN_PLACE = """
import numpy as np
def pipeline():
    def changed_in_place(image):
        image.putpixel((np.random.randint(8), np.random.randint(8)), (255, 0, 255))
        return image
    return changed_in_place
"""


def recipes(preset, repeats, size=16):
    """The recipe with and without repeats."""
    config = AugmentConfig(size=size, preset=preset, repeats=repeats)
    return config.recipe(), config.model_copy(update={"repeats": 1}).recipe()


@pytest.mark.parametrize("preset", ["cifar", "imagenet", "none"])
@pytest.mark.parametrize(("num_samples", "repeats"), [(40, 4), (41, 3), (7, 16)])
def test_a_view_is_byte_for_byte_that_without_repeats_under_the_same_draw(
    synthetic, preset, num_samples, repeats
):
    repeated, plain = recipes(preset, repeats)
    images = synthetic(num_samples=num_samples)
    by_seed = {seed: Views(plain, images).render(seed, range(num_samples)) for seed in range(20)}
    for seed in (0, 1, repeats + 1 if repeats < 16 else 2):
        found = Views(repeated, images).render(seed, range(num_samples))
        seeds = draw_seeds(num_samples, seed, repeats, np.arange(num_samples))
        for position, (sample, drawn) in enumerate(
            zip(found.samples_B.tolist(), seeds.tolist(), strict=True)
        ):
            wanted = by_seed[drawn]
            (there,) = np.flatnonzero(wanted.samples_B == sample)
            assert found.pixels_BHW3[position].tobytes() == wanted.pixels_BHW3[there].tobytes()
            assert found.digests_B[position] == wanted.digests_B[there]
            assert found.origins_B[position] == wanted.origins_B[there]


@pytest.mark.parametrize("preset", ["cifar", "deit"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_views_do_not_depend_on_their_batch(synthetic, preset, batch_size):
    recipe, _ = recipes(preset, 4)
    whole = Views(recipe, synthetic(num_samples=130)).render(3, range(130))
    views = Views(recipe, synthetic(num_samples=130))
    parts = [
        views.render(3, range(start, min(start + batch_size, 130)))
        for start in range(0, 130, batch_size)
    ]
    joined = ViewBatch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    for one, other in zip(joined, whole, strict=True):
        np.testing.assert_array_equal(one, other)


@settings(max_examples=20)
@given(num_samples=st.integers(8, 90), repeats=st.integers(2, 6), seed=st.integers(0, 20))
def test_mixing_joins_two_samples_of_one_pair_with_one_draw(synthetic, num_samples, repeats, seed):
    recipe = Recipe.model_validate(
        {"size": 8, "ops": [{"op": "pad_crop"}, {"op": "mixup"}], "repeats": repeats}
    )
    batch = Views(recipe, synthetic(num_samples=num_samples, sizes=((8, 8),))).render(
        seed, range(num_samples)
    )
    pairs = num_samples // 2 * 2
    np.testing.assert_array_equal(batch.samples_B[0:pairs:2], batch.partners_B[1:pairs:2])
    np.testing.assert_array_equal(batch.samples_B[1:pairs:2], batch.partners_B[0:pairs:2])
    np.testing.assert_array_equal(batch.weights_B[0:pairs:2], batch.weights_B[1:pairs:2])
    # Each repeat of a pair has a weight of its own.
    assert len(np.unique(batch.weights_B[0:pairs:2])) > pairs / 2 * 0.9 - 1


@pytest.mark.parametrize("preset", ["imagenet", "deit"])
def test_one_decode_serves_all_views_of_an_image(synthetic, preset):
    recipe, _ = recipes(preset, 4)
    images = synthetic(num_samples=512)
    views = Views(recipe, images)
    for start in range(0, 512, 64):
        views.render(0, range(start, start + 64))
    # 128 images; the last few are visited in turn and are within a batch as well.
    assert images.num_decoded == 128


def test_every_process_decodes_an_image_once_if_batches_are_whole_windows(synthetic):
    recipe, _ = recipes("imagenet", 4)
    processes = [Views(recipe, synthetic(num_samples=512)) for _ in range(3)]
    for step, start in enumerate(range(0, 512, 64)):
        processes[step % 3].render(0, range(start, start + 64))
    assert sum(views.dataset.num_decoded for views in processes) == 128


def test_a_pipeline_that_changes_its_image_does_not_change_other_views(synthetic, tmp_path):
    file = tmp_path / "pipelines.py"
    file.write_text(IN_PLACE)
    made_by = {"size": 8, "callable": f"{file}:pipeline"}
    images = synthetic(num_samples=16, sizes=((8, 8),))
    repeated = Views(Recipe(**made_by, repeats=4), images).render(1, range(16))
    plain = Views(Recipe(**made_by), images)
    seeds = draw_seeds(16, 1, 4, np.arange(16))
    for position, (sample, seed) in enumerate(
        zip(repeated.samples_B.tolist(), seeds.tolist(), strict=True)
    ):
        wanted = plain.render(seed, range(16))
        (there,) = np.flatnonzero(wanted.samples_B == sample)
        assert (repeated.pixels_BHW3[position] == wanted.pixels_BHW3[there]).all()


class Squares:
    """Images of side 10 that are counted."""

    def __init__(self):
        self.decoded = []

    def __len__(self):
        return 100

    def image(self, sample):
        self.decoded.append(sample)
        return Image.new("RGB", (10, 10), (sample, 0, 0))


def test_an_image_is_dropped_after_its_last_use():
    images = Squares()
    kept = DecodedImages(images, repeats=3)
    sizes = []
    for _ in range(4):
        assert kept.get(5).image.getpixel((0, 0)) == (5, 0, 0)
        sizes.append(kept.num_bytes)
    one = 100 * BYTES_PER_PIXEL
    assert sizes == [one, one, 0, one]
    assert images.decoded == [5, 5]


def test_nothing_is_kept_without_repeats():
    images = Squares()
    kept = DecodedImages(images, repeats=1)
    kept.get(5)
    kept.get(5)
    assert (kept.num_bytes, images.decoded) == (0, [5, 5])


@given(st.lists(st.integers(0, 9), max_size=60))
def test_kept_images_are_bounded_in_bytes_and_are_always_those_asked_for(samples):
    limit = 3 * 100 * BYTES_PER_PIXEL
    kept = DecodedImages(Squares(), repeats=4, max_bytes=limit)
    for sample in samples:
        assert kept.get(sample).image.getpixel((0, 0)) == (sample, 0, 0)
        assert kept.num_bytes <= limit


def test_an_image_above_the_bound_is_decoded_each_time():
    images = Squares()
    kept = DecodedImages(images, repeats=4, max_bytes=100 * BYTES_PER_PIXEL - 1)
    kept.get(1)
    kept.get(1)
    assert (kept.num_bytes, images.decoded) == (0, [1, 1])
