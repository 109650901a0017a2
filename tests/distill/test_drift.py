"""A cache recorded under Pillow 12, replayed under the Pillow that is installed.

Pillow 13 rounds differently when it resizes: a small share of pixels moves by a few levels. That is
refused unless decided otherwise, and another crop is never let through as if it were that.
"""

from __future__ import annotations

import shutil

import numpy as np
import PIL
import pytest
from support.pillow12 import CHANGES, GOLDEN, NUM_SAMPLES, SIDE
from support.toys import Patches

from cache_service.datasets import wrap_dataset
from cache_service.errors import ViewDriftError
from cache_service.views.identity import compare_views
from cache_service.views.replay import Views
from distill import CachedDataset, load_cache
from distill.replay import Replay

pytestmark = pytest.mark.skipif(
    PIL.__version__.startswith("12."), reason="the golden cache was recorded under this Pillow"
)

EVERY = list(range(NUM_SAMPLES))


@pytest.fixture
def images():
    return Patches(num_samples=NUM_SAMPLES, side=SIDE)


def test_the_recorded_order_draws_and_sources_are_the_same_under_another_pillow(images):
    cache = load_cache(str(GOLDEN))
    views = Views(cache.spec.recipe, wrap_dataset(images)).render(0, np.array(EVERY))
    rows = cache.read(0, 0, NUM_SAMPLES)
    np.testing.assert_array_equal(views.samples_B, rows["sample"])
    np.testing.assert_array_equal(views.origins_B, rows["origin"])
    assert (views.digests_B != rows["digest"]).any()


def test_rounding_of_another_pillow_is_refused_by_default_and_named(images):
    data = CachedDataset(load_cache(str(GOLDEN)), images=images, seed=0)
    with pytest.raises(ViewDriftError, match="so only the rendering changed") as refusal:
        data.__getitems__(EVERY)
    message = str(refusal.value)
    assert "rounding (at most" in message
    assert f"pillow was 12.0.0 at recording and is {PIL.__version__} here" in message
    assert "max_drift: 4" in message


def test_rounding_passes_under_the_stated_bound(images):
    cache = load_cache(str(GOLDEN))
    replayed = Views(cache.spec.recipe, wrap_dataset(images))
    worst = 0
    for shard in range(cache.spec.num_shards):
        views = replayed.render(0, cache.layout.witness_positions(shard)).pixels_BHW3
        pairs = zip(cache.witnesses(0, shard), views, strict=True)
        worst = max(worst, *(compare_views(*pair).max_levels for pair in pairs))
    assert 1 <= worst <= 4
    passing = CachedDataset(cache, images=images, seed=0, max_drift=4)
    assert len(passing.__getitems__(EVERY)) == NUM_SAMPLES


def test_another_crop_never_passes_as_rounding(images, monkeypatch):
    """Other draws give another origin, so even the widest bound refuses them."""
    replay = Replay(wrap_dataset(images), [load_cache(str(GOLDEN))], max_drift=255)
    render = replay.views.render
    order = np.array(EVERY)

    def shifted(seed, positions, **options):
        batch = render(seed, positions, **options)
        other = render(seed + 1, positions, **options)
        return other._replace(samples_B=batch.samples_B)

    monkeypatch.setattr(replay.views, "render", shifted)
    with pytest.raises(ViewDriftError, match="not rounding"):
        replay(0, order)


def test_a_user_pipeline_is_never_let_through_because_its_draws_are_unproven(images, tmp_path):
    from support.builds import record_toy

    changes = CHANGES | {"augment": {"size": 56, "callable": "support.pipelines:noisy"}}
    record_toy(str(tmp_path / "c"), **changes)
    cache = load_cache(str(tmp_path / "c"))
    assert len(CachedDataset(cache, images=images, seed=0).__getitems__(EVERY)) == NUM_SAMPLES
    shutil.copytree(tmp_path / "c", tmp_path / "d")
    import support.pipelines

    support.pipelines.NOISE += 1
    try:
        data = CachedDataset(load_cache(str(tmp_path / "d")), images=images, seed=0, max_drift=255)
        with pytest.raises(ViewDriftError, match="is not what the teacher saw"):
            data.__getitems__(EVERY)
    finally:
        support.pipelines.NOISE -= 1
