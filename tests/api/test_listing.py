"""Every Zarr library lists the arrays of a served cache by its address alone, and reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from obstore.store import HTTPStore
from support.caches import make_rows, make_spec, open_writer, write_cache
from support.serving import serving
from zarr.storage import ObjectStore

from cache_service.errors import CorruptError
from cache_service.format.group import decode_group
from cache_service.rows.reader import open_cache

ARRAYS = {"digest", "logits", "origin", "sample", "witness"}


@pytest.fixture(scope="module")
def url(server):
    return f"{server.url}/v1/caches/dense/zarr"


@pytest.fixture
def over_obstore(url):
    store = HTTPStore(url, client_options={"allow_http": True}, retry_config={"max_retries": 0})
    return ObjectStore(store, read_only=True)


def test_xarray_over_fsspec_has_every_array(url):
    opened = xarray.open_zarr(url)
    assert set(opened.variables) == ARRAYS
    assert opened["logits"].dims == ("seed", "position", "cell", "class")
    np.testing.assert_array_equal(opened["sample"][1].values, make_rows(make_spec(), 1)["sample"])


def test_zarr_over_fsspec_has_every_array(url):
    group = zarr.open_group(url, mode="r")
    assert set(group.array_keys()) == ARRAYS
    assert set(group.group_keys()) == {"commits"}
    np.testing.assert_array_equal(group["logits"][0], make_rows(make_spec(), 0)["logits"])


def test_zarr_over_obstore_has_every_array(over_obstore):
    assert set(zarr.open_group(over_obstore, mode="r").array_keys()) == ARRAYS


def test_xarray_over_obstore_has_every_array(over_obstore):
    assert set(xarray.open_zarr(over_obstore).variables) == ARRAYS


def test_tensorstore_reads_the_names_of_all_arrays_and_opens_each(url):
    http = {"driver": "http", "base_url": f"{url}/"}
    content = tensorstore.KvStore.open(http).result().read("zarr.json").result().value
    nodes = json.loads(content)["consolidated_metadata"]["metadata"]
    names = {name for name, node in nodes.items() if node["node_type"] == "array"}
    assert names == ARRAYS
    for name in names:
        base = {"driver": "http", "base_url": f"{url}/{name}/"}
        opened = tensorstore.open({"driver": "zarr3", "kvstore": base}, open=True).result()
        assert list(opened.shape) == nodes[name]["shape"]


def test_an_unrecorded_shard_is_an_error_over_fsspec_and_no_fill_value(server):
    group = zarr.open_group(f"{server.url}/v1/caches/half/zarr", mode="r")
    assert np.isfinite(group["logits"][0, :32]).all()
    with pytest.raises(Exception, match="503"):
        group["logits"][0, 32:64]


def test_the_listing_grows_with_a_build_that_goes_on(tmp_path):
    writer = write_cache(str(tmp_path / "cache"), make_spec(), range(1))
    with serving(tmp_path) as server:
        path = "/v1/caches/cache/zarr/zarr.json"
        first = server.ask("GET", path)
        assert first.headers["cache-control"] == "no-cache"
        open_writer(writer.storage, writer.spec, 3)
        second = server.ask("GET", path, headers={"If-None-Match": first.headers["etag"]})
        assert second.status == 200
        nodes = json.loads(second.data)["consolidated_metadata"]["metadata"]
        assert nodes["logits"]["shape"][0] == 3


def test_a_cache_copied_from_its_address_opens_and_its_listing_is_checked(server, root, tmp_path):
    content = server.ask("GET", "/v1/caches/dense/zarr/zarr.json").data
    assert decode_group(content, "here") == open_cache(str(root / "dense")).group
    forged = content.replace(b'"shape":[2,100,16,10]', b'"shape":[2,100,16,11]')
    assert forged != content
    with pytest.raises(CorruptError, match="seal does not fit"):
        decode_group(forged, "here")


@pytest.mark.parametrize(
    ("key", "status", "code"),
    [("zarr.json", 404, "not_a_cache"), ("sample/zarr.json", 500, "corrupt")],
)
def test_a_listing_is_not_sent_when_a_document_is_damaged(tmp_path, key, status, code):
    write_cache(str(tmp_path / "cache"), make_spec(), range(1))
    with serving(tmp_path) as server:
        assert server.ask("GET", "/v1/caches/cache/zarr/zarr.json").status == 200
        path = tmp_path / "cache" / key
        path.write_bytes(path.read_bytes().replace(b"e", b"f", 1))
        answer = server.ask("GET", "/v1/caches/cache/zarr/zarr.json")
        assert (answer.status, json.loads(answer.data)["code"]) == (status, code)
