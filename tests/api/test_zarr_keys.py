"""Stored objects over HTTP: Zarr libraries open the address, and a hole is an error to each."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from obstore.store import HTTPStore
from support.caches import make_head, make_rows, make_spec, make_witnesses, open_writer, write_cache
from support.serving import serving
from zarr.storage import ObjectStore

from cache_service.api.http.zarr import BadRangeError, parse_range
from cache_service.format.layout import CacheLayout

KEY = "logits/c/0/1/0/0"


def code(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    return json.loads(answer.data)["code"]


def by_obstore(url):
    quick = {"max_retries": 0}
    store = HTTPStore(url, client_options={"allow_http": True}, retry_config=quick)
    return zarr.open_group(ObjectStore(store, read_only=True), mode="r")


def by_tensorstore(url, array):
    spec = {"driver": "zarr3", "kvstore": {"driver": "http", "base_url": f"{url}/{array}/"}}
    context = tensorstore.Context({"http_request_retries": {"max_retries": 1}})
    return tensorstore.open(spec, open=True, context=context).result()


def stored(root, name):
    folder = root / name
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", ["dense", "zstd", "features"])
def test_every_stored_object_but_the_root_document_is_sent_as_it_is(server, root, name):
    for key, content in stored(root, name).items():
        if key == "zarr.json":
            continue
        answer = server.ask("GET", f"/v1/caches/{name}/zarr/{key}")
        assert (answer.status, answer.data) == (200, content), key
        head = server.ask("HEAD", f"/v1/caches/{name}/zarr/{key}")
        assert (head.status, head.data) == (200, b"")
        assert head.headers["content-length"] == str(len(content))
        assert head.headers["etag"] == answer.headers["etag"]


@pytest.mark.parametrize(
    ("asked", "cut", "told"),
    [
        ("bytes=0-9", slice(0, 10), "bytes 0-9"),
        ("bytes=5-", slice(5, None), None),
        ("bytes=-7", slice(-7, None), None),
        ("bytes=0-99999999", slice(0, None), None),
        ("bytes=-99999999", slice(0, None), None),
    ],
)
def test_a_range_is_answered_with_that_range(server, root, asked, cut, told):
    content = stored(root, "dense")[KEY]
    answer = server.ask("GET", f"/v1/caches/dense/zarr/{KEY}", headers={"Range": asked})
    assert (answer.status, answer.data) == (206, content[cut])
    first = range(len(content))[cut][0]
    wanted = told or f"bytes {first}-{len(content) - 1}"
    assert answer.headers["content-range"] == f"{wanted}/{len(content)}"


@pytest.mark.parametrize("asked", ["bytes=0-1,3-4", "items=0-1", "bytes=", "bytes=-", "bytes=5-2"])
def test_what_is_no_single_range_is_answered_with_the_whole(server, root, asked):
    answer = server.ask("GET", f"/v1/caches/dense/zarr/{KEY}", headers={"Range": asked})
    assert (answer.status, answer.data) == (200, stored(root, "dense")[KEY])


def test_a_range_beyond_the_end_is_416(server, root):
    size = len(stored(root, "dense")[KEY])
    for asked in (f"bytes={size}-", "bytes=-0"):
        answer = server.ask("GET", f"/v1/caches/dense/zarr/{KEY}", headers={"Range": asked})
        assert (answer.status, code(answer)) == (416, "range_not_satisfiable")
        assert answer.headers["content-range"] == f"bytes */{size}"


@given(size=st.integers(0, 50), first=st.integers(0, 60), last=st.integers(0, 60))
def test_a_parsed_range_is_what_slicing_gives(size, first, last):
    content = bytes(range(size))
    try:
        span = parse_range(f"bytes={first}-{last}", size)
    except BadRangeError:
        assert first >= size
    else:
        if span is None:
            assert last < first
        else:
            assert content[span.start : span.stop] == content[first : last + 1] != b""


def test_conditions_on_the_etag_are_kept(server):
    path = f"/v1/caches/dense/zarr/{KEY}"
    etag = server.ask("GET", path).headers["etag"]
    assert server.ask("GET", path, headers={"If-None-Match": etag}).status == 304
    assert server.ask("GET", path, headers={"If-Match": etag}).status == 200
    stale = server.ask("GET", path, headers={"If-Match": '"other"'})
    assert (stale.status, code(stale)) == (412, "precondition_failed")
    part = {"Range": "bytes=0-3"}
    assert server.ask("GET", path, headers={**part, "If-Range": etag}).status == 206
    assert server.ask("GET", path, headers={**part, "If-Range": '"other"'}).status == 200


def test_a_large_object_comes_in_pieces_and_whole(tmp_path):
    spec = make_spec(num_samples=2048, num_classes=100, shard_rows=1024, chunk_rows=64)
    write_cache(str(tmp_path / "large"), spec, range(1))
    content = stored(tmp_path, "large")[KEY]
    assert len(content) > 3 << 20
    with serving(tmp_path) as server:
        assert server.ask("GET", f"/v1/caches/large/zarr/{KEY}").data == content
        part = server.ask(
            "GET", f"/v1/caches/large/zarr/{KEY}", headers={"Range": "bytes=1-2500000"}
        )
        assert (part.status, part.data) == (206, content[1:2500001])


@pytest.mark.parametrize(
    "key",
    [
        "",
        "nothing",
        "logits",
        "logits/",
        "logits/c/0/4/0/0",
        "logits/c/0/1/0",
        "logits/c/0/1/0/0/0",
        "logits/c/00/1/0/0",
        "logits/c/0/1/0/1",
        "nothing/c/0/0",
        "commits/0/9.json",
        "commits/00/0.json",
        "commits/0/0.json/",
        ".scratch",
        "c/0",
        "logits/.zarray",
        ".zmetadata",
        "witness/c/0/0",
    ],
)
def test_a_key_that_no_cache_has_is_404(server, key):
    answer = server.ask("GET", f"/v1/caches/dense/zarr/{key}")
    assert (answer.status, code(answer)) == (404, "no_such_key")


def test_an_object_of_an_unbuilt_shard_is_not_a_404(server):
    for key in ("logits/c/0/1/0/0", "sample/c/1/0", "witness/c/0/3/0/0/0/0"):
        answer = server.ask("GET", f"/v1/caches/half/zarr/{key}")
        assert (answer.status, code(answer)) == (503, "rows_not_built")
        assert int(answer.headers["retry-after"]) > 0
    answer = server.ask("GET", "/v1/caches/half/zarr/commits/0/1.json")
    assert (answer.status, code(answer)) == (404, "rows_not_built")


def test_zarr_python_reads_every_row_over_obstore(server, root):
    for name, codec in (("dense", None), ("features", {"kind": "features", "num_channels": 6})):
        spec = make_spec(codec=codec)
        group = by_obstore(f"{server.url}/v1/caches/{name}/zarr")
        for array, values in make_rows(spec, 0).items():
            np.testing.assert_array_equal(group[array][0], values)
        np.testing.assert_array_equal(group["witness"][0, 1], make_witnesses(spec, 0, 1))
    np.testing.assert_array_equal(group["head_weight"][:], make_head(spec).weight_CD)


def test_tensorstore_reads_every_row(server):
    spec = make_spec()
    rows = make_rows(spec, 1)
    for array in CacheLayout(spec).arrays:
        opened = by_tensorstore(f"{server.url}/v1/caches/dense/zarr", array.name)
        np.testing.assert_array_equal(opened[1].read().result(), rows[array.name])


def test_xarray_opens_the_address(server):
    store = HTTPStore(f"{server.url}/v1/caches/dense/zarr", client_options={"allow_http": True})
    opened = xarray.open_zarr(ObjectStore(store, read_only=True))
    assert opened["logits"].dims == ("seed", "position", "cell", "class")
    np.testing.assert_array_equal(opened["sample"][0].values, make_rows(make_spec(), 0)["sample"])


@pytest.mark.parametrize("damage", ["missing", "empty", "short", "flipped", "foreign", "unbuilt"])
def test_no_zarr_library_reads_a_hole_as_numbers(tmp_path, damage):
    spec = make_spec()
    write_cache(str(tmp_path / "cache"), spec, range(1))
    path = tmp_path / "cache" / KEY
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "unbuilt":
        (tmp_path / "cache/commits/0/1.json").unlink()
        path.unlink()
    else:
        flipped = bytearray(content)
        flipped[1000] ^= 4
        path.write_bytes(
            {
                "empty": b"",
                "short": content[:-5],
                "flipped": bytes(flipped),
                "foreign": (tmp_path / "cache/logits/c/0/2/0/0").read_bytes() + b"\0",
            }[damage]
        )
    with serving(tmp_path) as server:
        url = server.cache_url("cache") + "/zarr"
        group = by_obstore(url)
        with pytest.raises(Exception, match=r"(?i)500|503|checksum|crc|corrupt|digest"):
            group["logits"][0, 32:64]
        np.testing.assert_array_equal(group["logits"][0, :32], make_rows(spec, 0)["logits"][:32])
        with pytest.raises(Exception, match=r"(?i)500|503|checksum|crc|corrupt|digest"):
            by_tensorstore(url, "logits")[0, 32:64].read().result()


@pytest.mark.parametrize("key", ["logits/zarr.json", "commits/zarr.json", "commits/0/1.json"])
def test_damaged_metadata_is_an_error_and_not_sent(tmp_path, key):
    write_cache(str(tmp_path / "cache"), make_spec(), range(1))
    with serving(tmp_path) as server:
        assert server.ask("GET", f"/v1/caches/cache/zarr/{key}").status == 200
        path = tmp_path / "cache" / key
        path.write_bytes(path.read_bytes().replace(b"e", b"f", 1))
        answer = server.ask("GET", f"/v1/caches/cache/zarr/{key}")
        assert (answer.status, code(answer)) == (500, "corrupt")


def test_metadata_grows_with_a_build_that_goes_on(tmp_path):
    spec = make_spec()
    writer = write_cache(str(tmp_path / "cache"), spec, range(1))
    with serving(tmp_path) as server:
        path = "/v1/caches/cache/zarr/logits/zarr.json"
        first = server.ask("GET", path)
        assert first.headers["cache-control"] == "no-cache"
        open_writer(writer.storage, spec, 3)
        second = server.ask("GET", path, headers={"If-None-Match": first.headers["etag"]})
        assert second.status == 200
        assert json.loads(second.data)["shape"][0] == 3
