"""The client and the service itself, together."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from support.caches import make_spec, write_shard
from support.command import kd_cache
from support.ordered import epoch_in_batches, ordered_rows, same, write_ordered
from support.serving import READ_TOKEN, TOKENS, serving

from cache_service.errors import ConfigError, CorruptError, NotACacheError, RowsNotBuiltError
from cache_service.remote.source import open_source
from cache_service.rows.reader import open_cache


@pytest.fixture(scope="module")
def url(root):
    with serving(root) as server:
        yield server.cache_url("c")


def test_rows_of_the_service_are_the_rows_of_the_folder(url, local):
    cache = open_source(url, fingerprint=local.fingerprint)
    numbers = np.arange(300)[::-7]
    for seed, size in ((0, 37), (1, 300)):
        assert same(epoch_in_batches(cache, seed, size), local.read(seed, 0, 300))
        assert same(cache.lookup(seed, numbers), local.lookup(seed, numbers))
    assert same(cache.read(0, 3, 9, arrays=("digest",)), local.read(0, 3, 9, arrays=("digest",)))
    assert cache.commits() == local.commits()
    assert (cache.witnesses(0, 1) == local.witnesses(0, 1)).all()
    assert cache.commit(0, 1).seed == 0


def test_info_and_verify_of_the_service_say_what_the_folder_says(url, root):
    there = json.loads(kd_cache("info", str(root / "c"), "--json").out)
    assert json.loads(kd_cache("info", url, "--json").out) == there | {"cache": url}
    ended = kd_cache("verify", url)
    assert (ended.code, ended.err) == (0, "")


def test_refusals_of_the_service_keep_their_kind(url):
    cache = open_source(url)
    with pytest.raises(RowsNotBuiltError, match="of seed 5 are not recorded"):
        cache.read(5, 0, 3)
    with pytest.raises(RowsNotBuiltError, match="of seed 5 are not recorded"):
        cache.commit(5, 0)
    with pytest.raises(NotACacheError, match="there is no cache 'cx' here"):
        open_source(url + "x")


@pytest.mark.parametrize("path", ["", "/v1/nothing", "/v1/cache/c", "/caches/c"])
def test_an_address_of_no_cache_is_told_how_addresses_look(url, path):
    with pytest.raises(NotACacheError, match="no cache at") as refused:
        open_source(url.partition("/v1")[0] + path)
    assert "/v1/caches/NAME" in refused.value.hint
    assert "/v1/caches/NAME" in kd_cache("info", url.partition("/v1")[0] + path).err


def test_the_service_wants_its_token(root, monkeypatch):
    with serving(root, tokens=TOKENS) as server:
        with pytest.raises(ConfigError, match=r"asks for a token, and none is set here \(401\)"):
            open_source(server.cache_url("c"))
        monkeypatch.setenv("KD_CACHE_TOKEN", "another")
        with pytest.raises(ConfigError, match=r"does not know the token that was sent \(401\)"):
            open_source(server.cache_url("c"))
        monkeypatch.setenv("KD_CACHE_TOKEN", READ_TOKEN)
        assert open_source(server.cache_url("c")).complete_seeds() == [0, 1]


def test_damage_behind_the_service_is_damage_here(tmp_path):
    write_ordered(tmp_path / "c", make_spec(num_samples=60), seeds=1)
    path = tmp_path / "c/logits/c/0/1/0/0"
    with serving(tmp_path) as server:
        cache = open_source(server.cache_url("c"))
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(CorruptError, match=r"has \d+ bytes, but \d+ were committed"):
            cache.read(0, 40, 50)
        ended = kd_cache("verify", server.cache_url("c"))
    assert ended.code == 3
    assert "damaged: seed 0 shard 1" in ended.out


def test_rows_of_a_build_are_awaited_through_the_service(tmp_path):
    spec = make_spec(num_samples=90, shard_rows=32, chunk_rows=8)
    writer = write_ordered(tmp_path / "c", spec, seeds=1, shards=[0])
    rows = ordered_rows(spec, 0)

    def build():
        for shard in (1, 2):
            time.sleep(0.2)
            write_shard(writer, 0, shard, rows=rows)

    with serving(tmp_path) as server:
        with pytest.raises(RowsNotBuiltError, match=r"\[32, 64\) of seed 0 are not recorded"):
            open_source(server.cache_url("c"), wait_s=0.2).read(0, 30, 40)
        assert open_source(server.cache_url("c")).commits() == {0: [0]}
        builder = threading.Thread(target=build)
        builder.start()
        found = epoch_in_batches(open_source(server.cache_url("c"), wait_s=300), 0, 20)
        builder.join()
    assert same(found, open_cache(str(tmp_path / "c")).read(0, 0, 90))
