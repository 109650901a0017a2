"""A drawn MNIST and a drawn CIFAR."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.strips import write_strips
from support.strokes import write_strokes


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_strokes(tmp_path_factory.mktemp("strokes"))


@pytest.fixture(scope="session")
def strips(tmp_path_factory) -> Path:
    return write_strips(tmp_path_factory.mktemp("drawn") / "strips")
