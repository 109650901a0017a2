"""One behavior, every storage: `storage` is parametrized over them."""

from __future__ import annotations

import pytest
from support import s3

from cache_service.storage import open_storage


@pytest.fixture(
    params=["local", "s3-moto", pytest.param("s3-real", marks=pytest.mark.faults)],
)
def url(request, tmp_path, monkeypatch):
    """An address below which nothing is written yet."""
    if request.param == "local":
        return str(tmp_path / "root")
    environment = s3.moto_environment() if request.param == "s3-moto" else s3.real_environment()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return s3.new_prefix()


@pytest.fixture
def storage(url):
    return open_storage(url)
