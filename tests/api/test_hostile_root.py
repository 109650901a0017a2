"""Caches made to harm whoever serves them: refused, nothing run or allocated, the rest goes on."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import psutil
import pytest
from support.caches import make_spec, write_cache
from support.hostile import bomb, plant_chunk, reseal_root
from support.serving import serving

MEBIBYTE = 2**20

PATHS = [
    "/v1/caches/bad",
    "/v1/caches/bad/rows?seed=0&start=0&stop=32",
    "/v1/caches/bad/zarr/zarr.json",
    "/v1/caches/bad/zarr/logits/zarr.json",
    "/v1/caches/bad/zarr/logits/c/0/0/0/0",
    "/v1/caches/bad/zarr/planted.pt",
    "/caches/bad",
    "/v1/caches",
    "/",
]


class Mine:
    """What a pickle can do to whoever loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def edit(path, change):
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(document))


def pickle_codec(cache):
    for key in ("zarr.json", "logits/zarr.json"):
        text = (cache / key).read_text()
        (cache / key).write_text(text.replace('"name":"zstd"', '"name":"numcodecs.pickle"'))
    edit(
        cache / "logits/zarr.json",
        lambda document: document.__setitem__("codecs", [{"name": "numcodecs.pickle"}]),
    )


def object_dtype(cache):
    edit(cache / "logits/zarr.json", lambda doc: doc.__setitem__("data_type", "object"))


def billion_rows(cache):
    edit(cache / "logits/zarr.json", lambda doc: doc.__setitem__("shape", [10**9, 10**9, 16, 10]))


def billion_classes(cache):
    def enlarge(facts):
        facts["spec"]["dataset"]["num_samples"] = 10**12
        facts["fingerprint"] = "0" * 64

    reseal_root(cache, enlarge)


def endless_root(cache):
    (cache / "zarr.json").write_text("[" * 1_000_000)


def zip_bomb(cache):
    plant_chunk(cache, "logits/c/0/0/0/0", bomb(24 * MEBIBYTE, declared=64 << 30))


def planted_pickle(cache):
    payload = pickle.dumps(Mine(str(cache.parent / "harmed")))
    (cache / "planted.pt").write_bytes(payload)
    plant_chunk(cache, "logits/c/0/0/0/0", payload)


DEEDS = [
    pickle_codec,
    object_dtype,
    billion_rows,
    billion_classes,
    endless_root,
    zip_bomb,
    planted_pickle,
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    spec = make_spec(num_samples=32, shard_rows=32, chunk_rows=32, codec=ZSTD)
    write_cache(str(folder / "bad"), spec, range(1))
    write_cache(str(folder / "good"), spec, range(1))
    return folder


ZSTD = {"kind": "dense", "compression": "zstd"}


def answers(server):
    return {path: server.ask("GET", path) for path in PATHS}


@pytest.mark.parametrize("deed", DEEDS)
def test_a_hostile_cache_is_refused_and_its_neighbor_served(whole, tmp_path, deed):
    root = tmp_path / "root"
    shutil.copytree(whole, root)
    with serving(root) as server:
        clean = answers(server)
        assert {each.status for each in clean.values()} <= {200, 404}
    deed(root / "bad")
    with serving(root) as server:
        before = psutil.Process().memory_info().rss
        found = answers(server)
        assert psutil.Process().memory_info().rss - before < 64 * MEBIBYTE
        good = server.ask("GET", "/v1/caches/good/rows?seed=0&start=0&stop=32")
        assert good.status == 200
    refused = 0
    for path, answer in found.items():
        if answer.status == 200 and path.startswith("/v1/caches/bad"):
            # What harms is not handed on; but an object that is as committed goes out unread.
            stored = root / path.removeprefix("/v1/caches/").replace("/zarr/", "/")
            known = stored.read_bytes() if "/zarr/logits/c/" in path else clean[path].data
            assert answer.data == known, path
        elif path.startswith("/v1/caches/bad"):
            assert answer.headers["content-type"] == "application/problem+json", path
            assert answer.json()["code"] in ("corrupt", "not_a_cache", "no_such_key"), path
            assert str(root) not in answer.data.decode()
            refused += not path.endswith(".pt")
    assert refused
    assert found["/"].status == found["/v1/caches"].status == 200
    assert not (root / "harmed").exists()
