"""One small recording of real images, handwritten digits, for all loops."""

from __future__ import annotations

import pytest
from support.loops import record_digits

from cache_service.datasets import DatasetConfig, open_dataset
from distill import load_cache


@pytest.fixture(scope="session")
def url(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("loops") / "digits")
    record_digits(path)
    return path


@pytest.fixture(scope="session")
def images():
    return open_dataset(DatasetConfig(name="digits"))


@pytest.fixture
def cache(url):
    return load_cache(url)
