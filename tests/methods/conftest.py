"""One set of recorded caches for all tests of methods: recording them is the slow part."""

from __future__ import annotations

import pytest
from support.recorded_runs import RecordedRuns


@pytest.fixture(scope="session")
def recorded_runs(tmp_path_factory):
    return RecordedRuns(tmp_path_factory.mktemp("runs"))
