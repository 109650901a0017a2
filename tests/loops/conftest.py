"""One small recording of real images, handwritten digits, for all loops."""

from __future__ import annotations

import pytest
from support.builds import record_toy

from cache_service.datasets import DatasetConfig, open_dataset
from distill import load_cache

DIGITS = {"name": "digits"}
SEEDS = (0, 1)


@pytest.fixture(scope="session")
def url(tmp_path_factory):
    """1,442 images of 8 x 8 pixels under two seeds, in three shards each."""
    path = str(tmp_path_factory.mktemp("loops") / "digits")
    record_toy(
        path,
        dataset=DIGITS,
        augment={"size": 8, "ops": [{"op": "pad_crop", "padding": 1}]},
        scales=[1],
        layout={"shard_rows": 512, "chunk_rows": 64},
        batch_size=512,
    )
    return path


@pytest.fixture(scope="session")
def images():
    return open_dataset(DatasetConfig.model_validate(DIGITS))


@pytest.fixture
def cache(url):
    return load_cache(url)
