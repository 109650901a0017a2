"""Caches of known rows: each codec, in a folder and in a bucket, written once per session."""

from __future__ import annotations

import functools

import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from support import s3
from support.caches import make_spec, write_cache
from support.everything import Expected
from support.storages import FetchingStorage

from cache_service.rows.reader import open_cache

CODECS = {
    "dense": {"kind": "dense"},
    "dense-zstd": {"kind": "dense", "compression": "zstd"},
    "int8": {"kind": "int8"},
    "topk": {"kind": "topk", "k": 4, "compression": "zstd"},
    "features": {"kind": "features", "num_channels": 6},
}


@functools.cache
def expected_of(codec: str) -> Expected:
    return Expected(make_spec(codec=CODECS[codec]), num_seeds=2)


@pytest.fixture(scope="session")
def write_once(tmp_path_factory):
    """Write the cache of a codec to a storage, once, and say where."""
    made: dict[tuple[str, str], str] = {}

    def write(codec: str, where: str) -> str:
        if (codec, where) not in made:
            url = s3.new_prefix() if where == "s3-moto" else str(tmp_path_factory.mktemp(codec))
            write_cache(url, expected_of(codec).spec, range(2))
            made[codec, where] = url
        return made[codec, where]

    return write


def _named(places: tuple[str, ...]) -> dict:
    pairs = [(codec, place) for place in places for codec in CODECS]
    return {"params": pairs, "ids": ["-".join(pair) for pair in pairs]}


@pytest.fixture(**_named(("local", "s3-moto")))
def recorded(request, write_once, monkeypatch):
    """(cache, what it must hold): two complete seeds of 100 samples, the last shard of 4 rows."""
    codec, where = request.param
    if where == "s3-moto":
        for name, value in s3.moto_environment().items():
            monkeypatch.setenv(name, value)
    return open_cache(write_once(codec, where)), expected_of(codec)


@pytest.fixture(**_named(("mapped", "fetched")))
def recorded_here(request, write_once):
    """The same in a folder: as it is read best, and as if it could not be mapped."""
    codec, how = request.param
    cache = open_cache(write_once(codec, "local"))
    if how == "fetched":
        cache.storage = FetchingStorage(cache.url)
    return cache, expected_of(codec)
