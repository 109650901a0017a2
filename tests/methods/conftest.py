"""One classroom for all tests of methods: recording its caches is the slow part."""

from __future__ import annotations

import pytest
from support.classroom import Classroom


@pytest.fixture(scope="session")
def classroom(tmp_path_factory):
    return Classroom(tmp_path_factory.mktemp("classroom"))
