"""A drawn MNIST."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.strokes import write_strokes


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_strokes(tmp_path_factory.mktemp("strokes"))
