"""Stored objects from memory maps: the bytes of the file as it is now, whatever happens to it."""

from __future__ import annotations

import os

import numpy as np
import pytest
from support.caches import make_rows, make_spec, write_cache
from support.serving import serving

from cache_service.api.http import mapped
from cache_service.api.http.mapped import MappedObject

KEY = "logits/c/0/1/0/0"


@pytest.fixture
def served(tmp_path):
    write_cache(str(tmp_path / "c"), make_spec(), range(1))
    with serving(tmp_path) as server:
        yield server, tmp_path / "c" / KEY


def ask(server, **headers):
    return server.ask("GET", f"/v1/caches/c/zarr/{KEY}", headers=headers)


def test_a_mapped_object_is_sent_again_without_storage(served, monkeypatch):
    server, file = served
    whole = file.read_bytes()
    assert ask(server).data == whole
    opened = server.service.catalog.open("c")
    monkeypatch.setattr(opened.cache.storage, "get_ranges", None)
    monkeypatch.setattr(opened.cache.storage, "get", None)
    for _ in range(2):
        assert ask(server).data == whole
        part = ask(server, Range="bytes=7-99")
        assert (part.status, part.data) == (206, whole[7:100])
    assert part.headers["etag"] == ask(server).headers["etag"]
    assert ask(server, Range="bytes=-1").data == whole[-1:]


@pytest.mark.parametrize("change", ["gone", "short", "empty", "link"])
def test_an_object_that_is_spoiled_after_it_was_sent_is_an_error(served, change):
    server, file = served
    assert ask(server).status == 200
    content = file.read_bytes()
    file.unlink()
    if change == "link":
        outside = file.parents[6] / "outside"
        outside.write_bytes(content)
        file.symlink_to(outside)
    elif change != "gone":
        file.write_bytes(content[:-1] if change == "short" else b"")
    answer = ask(server)
    assert (answer.status, answer.json()["code"]) == (500, "corrupt")


def test_an_object_that_is_restored_is_sent_again(served):
    server, file = served
    whole = ask(server).data
    file.unlink()
    assert ask(server).status == 500
    file.write_bytes(whole)
    assert ask(server).data == whole


def test_rows_and_raw_keys_of_one_shard_agree(served):
    server, _ = served
    rows = server.ask("GET", "/v1/caches/c/rows?seed=0&start=32&stop=36&arrays=logits").data
    wanted = make_rows(make_spec(), 0)["logits"][32:36].tobytes()
    assert wanted in rows
    assert wanted in ask(server).data


def test_parts_are_ready_once_they_were_read(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "PART_BYTES", 8192)
    file = tmp_path / "object"
    content = np.arange(20_000, dtype=np.uint32).astype(np.uint8)
    file.write_bytes(content.tobytes())
    found = MappedObject("x", file, np.memmap(file, np.uint8, "r"))
    assert not found.is_ready(0, 1)
    found.touch(8191, 8193)
    assert found.is_ready(0, 16384)
    assert not found.is_ready(16383, 16385)
    assert bytes(found.view(3, 9)) == content[3:9].tobytes()
    assert found.is_current()
    os.utime(file, ns=(1, 1))
    assert not found.is_current()
