"""The pipelines of `examples/augmentations.py` make views that replay."""

from __future__ import annotations

import numpy as np
import pytest
from support.pages import ROOT
from support.toys import Patches

from cache_service.datasets import wrap_dataset
from cache_service.format.recipe import AugmentConfig
from cache_service.views.replay import Views
from cache_service.views.replay_probe import require_replayable


@pytest.mark.parametrize("name", ["torchvision_crop", "albumentations_crop", "timm_crop"])
def test_a_pipeline_of_the_example_replays(name):
    config = AugmentConfig(size=224, callable=f"{ROOT}/examples/augmentations.py:{name}")
    views = Views(config.recipe(), wrap_dataset(Patches(16, side=64)))
    require_replayable(views, 0)  # starts a process, hence seconds
    first, second = (views.render(seed, range(16)) for seed in (0, 1))
    # RandAugment of timm may draw an op that makes views of one color.
    assert len(np.unique(first.digests_B)) >= 12
    assert (first.digests_B != second.digests_B).mean() > 0.7
