"""A service over a bucket answers what it answers of a folder: rows, objects, holes, damage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support import s3
from support.caches import make_rows, make_spec, open_writer, write_cache, write_shard
from support.serving import serving

from cache_service.api.http import catalog
from cache_service.errors import ConfigError
from cache_service.remote.source import open_source
from cache_service.rows.reader import open_cache
from cache_service.storage import open_storage


@pytest.fixture(scope="module")
def root():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.moto_environment().items():
            patch.setenv(name, value)
        url = s3.new_prefix()
        write_cache(f"{url}/dense", make_spec(), range(2))
        half = open_writer(f"{url}/half", make_spec(), 2)
        write_shard(half, 0, 0, rows=make_rows(half.spec, 0))
        write_cache(f"{url}/hurt", make_spec(), range(1))
        storage = open_storage(f"{url}/hurt")
        storage.delete("logits/c/0/1/0/0")
        open_storage(url).put("stray.txt", b"no cache")
        open_storage(url).put("other/stray.txt", b"no cache")
        yield url


@pytest.fixture(scope="module")
def server(root):
    with serving(root) as running:
        yield running


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    write_cache(str(folder / "dense"), make_spec(), range(2))
    half = open_writer(str(folder / "half"), make_spec(), 2)
    write_shard(half, 0, 0, rows=make_rows(half.spec, 0))
    return folder


@pytest.fixture(scope="module")
def beside(local):
    """The same caches, served from a folder."""
    with serving(local) as running:
        yield running


def test_the_service_is_ready_when_the_bucket_can_be_listed(server):
    assert server.ask("GET", "/readyz").json() == {"status": "ready"}
    assert server.ask("GET", "/").status == 200


def test_caches_are_the_prefixes_that_hold_one(server):
    listed = server.ask("GET", "/v1/caches").json()["caches"]
    assert [each["name"] for each in listed] == ["dense", "half", "hurt"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/caches/dense",
        "/v1/caches/half",
        "/v1/caches/dense/rows?seed=1&start=20&stop=90",
        "/v1/caches/half/rows?seed=0&start=0&stop=32",
        "/v1/caches/half/rows?seed=0&start=0&stop=40",
        "/v1/caches/half/rows?seed=9&start=0&stop=40",
        "/v1/caches/dense/rows?seed=0&start=0&stop=4000",
        "/v1/caches/dense/zarr/zarr.json",
        "/v1/caches/dense/zarr/logits/c/1/2/0/0",
        "/v1/caches/dense/zarr/commits/1/2.json",
        "/v1/caches/half/zarr/logits/c/1/2/0/0",
        "/v1/caches/dense/zarr/nothing",
        "/v1/caches/none",
        "/v1/caches/other",
        "/v1/caches/stray.txt",
        "/v1/caches/%2e%2e%2fdense",
    ],
)
def test_a_bucket_is_answered_as_a_folder_is(server, beside, path):
    found, wanted = server.ask("GET", path), beside.ask("GET", path)
    assert (found.status, found.headers["content-type"]) == (
        wanted.status,
        wanted.headers["content-type"],
    )
    assert found.headers.get("kd-cache-crc32c") == wanted.headers.get("kd-cache-crc32c")
    assert found.data == wanted.data


def test_lookups_are_answered_as_from_a_folder(server, beside):
    samples = np.array([7, 99, 7, 0, 31], "<i4").tobytes()
    path, told = (
        "/v1/caches/dense/lookup?seed=1",
        {"headers": {"Content-Type": "application/octet-stream"}, "body": samples},
    )
    found = server.ask("POST", path, **told)
    assert found.status == 200
    assert found.data == beside.ask("POST", path, **told).data


def test_a_range_of_an_object_is_that_range(server, root):
    whole = open_storage(f"{root}/dense").get("logits/c/0/0/0/0")
    asked = {"headers": {"Range": "bytes=100-199"}}
    found = server.ask("GET", "/v1/caches/dense/zarr/logits/c/0/0/0/0", **asked)
    assert (found.status, found.data) == (206, whole[100:200])


def test_a_client_reads_through_the_service_what_the_bucket_has(server, local):
    samples = np.arange(99, -1, -3)
    wanted = open_cache(str(local / "dense")).lookup(1, samples)
    found = open_source(server.cache_url("dense")).lookup(1, samples)
    for name, values in wanted.items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize("path", ["rows?seed=0&start=40&stop=50", "zarr/logits/c/0/1/0/0"])
def test_a_hole_is_an_error_and_tells_neither_bucket_nor_secret(server, root, path):
    found = server.ask("GET", f"/v1/caches/hurt/{path}")
    assert (found.status, found.json()["code"]) == (500, "corrupt")
    for private in (root, s3.BUCKET, s3.SECRET, "canary"):
        assert private not in found.data.decode()


def test_a_cache_that_comes_while_serving_is_seen(root, monkeypatch):
    monkeypatch.setattr(catalog, "BUCKET_TTL_S", 0.0)
    with serving(root) as server:
        assert server.ask("GET", "/v1/caches/late").status == 404
        write_cache(f"{root}/late", make_spec(), range(1))
        assert server.ask("GET", "/v1/caches/late/rows?seed=0&start=0&stop=8").status == 200


def test_a_bucket_that_is_down_is_said_without_where_it_is(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "canary-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with serving("s3://private-bucket/root") as running:
        assert running.ask("GET", "/healthz").status == 200
        for path in (
            "/readyz",
            "/v1/caches",
            "/v1/caches/x",
            "/v1/caches/x/rows?seed=0&start=0&stop=1",
        ):
            found = running.ask("GET", path)
            assert 500 <= found.status < 600, path
            text = json.dumps(found.json())
            for private in ("private-bucket", "canary", "127.0.0.1:9"):
                assert private not in text, (path, text)


def test_a_bucket_that_is_down_is_served_once_it_is_up_and_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(catalog, "START_S", 0.0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    catalog.Catalog("s3://private-bucket/root", open_shards=4)


def test_a_cache_in_a_bucket_is_no_root_and_a_slash_at_the_end_is_no_difference(root):
    with pytest.raises(ConfigError, match="dense is a cache itself") as refusal:
        catalog.Catalog(f"{root}/dense", open_shards=4)
    assert refusal.value.hint == f"kd-cache serve {root}"
    assert catalog.Catalog(f"{root}/", open_shards=4).names()[:2] == ["dense", "half"]
