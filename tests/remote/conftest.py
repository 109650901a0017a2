"""A cache of known rows in the order of its seeds, and a small server of it."""

from __future__ import annotations

import pytest
from support.caches import make_spec
from support.ordered import write_ordered
from support.origin import serving

from cache_service.rows.reader import open_cache

NUM_SAMPLES = 300


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    write_ordered(folder / "c", make_spec(num_samples=NUM_SAMPLES, shard_rows=64, chunk_rows=16))
    return folder


@pytest.fixture(scope="session")
def local(root):
    return open_cache(str(root / "c"))


@pytest.fixture
def origin(root):
    with serving(root) as server:
        yield server


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("KD_CACHE_TOKEN", raising=False)
    monkeypatch.delenv("KD_CACHE_TOKEN_FILE", raising=False)
