from __future__ import annotations

import pytest
import torch

from cache_service.models.create import create_model


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def network():
    """Make a network with 11 classes and always the same weights, ready to answer."""

    def make(name, **model_args):
        return create_model(name, num_classes=11, seed=3, **model_args).eval()

    return make


@pytest.fixture
def images():
    """Make two random images of a given side, the same in every test."""

    def make(size, width=None):
        generator = torch.Generator().manual_seed(5)
        return torch.randn(2, 3, size, width or size, generator=generator)

    return make
