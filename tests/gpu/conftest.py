"""Tests of this folder need a GPU; without one they are skipped."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="torch finds no GPU here")
    for item in items:
        if "/tests/gpu/" in str(item.path):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)
