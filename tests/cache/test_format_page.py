"""`docs/cache-format.md` is true: its examples run, and its numbers are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from support import golden
from support.caches import make_spec
from support.everything import files_of

from cache_service.format.canonical import canonical_json, crc32c, sha256_hex
from cache_service.format.layout import MAX_PIECE_BYTES, CacheLayout
from cache_service.format.spec import CacheSpec
from cache_service.views.order import ORDER_KEY, epoch_order

PAGE = (Path(__file__).parents[2] / "docs" / "cache-format.md").read_text()
DENSE, TOPK = golden.FOLDER / "dense", golden.FOLDER / "topk"


@pytest.fixture(scope="module")
def page():
    """The names that the page's code defines, with `path` the dense golden cache."""
    names = {"path": str(DENSE), "np": np}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "docs/cache-format.md", "exec"), names)
    return names


def test_the_zarr_example_reads_the_logits_of_a_committed_shard(page):
    rows = golden.golden_rows(golden.golden_spec("dense"), 1)
    samples, logits = page["read_logits"](1, 2)
    np.testing.assert_array_equal(samples, rows["sample"][16:20])
    np.testing.assert_array_equal(logits, rows["logits"][16:20].astype(np.float32))
    with pytest.raises(LookupError, match="shard 3 of seed 1 is not recorded"):
        page["read_logits"](1, 3)


def test_the_example_without_zarr_reads_every_array_of_every_shard(page):
    spec = golden.golden_spec("dense")
    for seed in golden.SEEDS:
        rows = golden.golden_rows(spec, seed)
        for shard in range(spec.num_shards):
            start, stop = spec.shard_range(shard)
            for array in CacheLayout(spec).arrays:
                found = page["read_shard"](array.name, seed, shard, array.row_shape, array.dtype)
                np.testing.assert_array_equal(found[: stop - start], rows[array.name][start:stop])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_topk_example_is_our_decoder(page, temperature):
    spec = golden.golden_spec("topk")
    rows = golden.golden_rows(spec, 0)
    kept = ("classes", "values", "tail_mean", "tail_var", "tail_max", "tail_lme")
    found = page["decode_topk"](*(rows[name] for name in kept), 6, temperature)
    np.testing.assert_allclose(
        found, spec.decode(rows, temperature=temperature, head=None), rtol=1e-6
    )


def test_the_example_of_packed_rows_is_our_decoder(page):
    codec = {"kind": "topk", "k": 30, "packed": True}
    spec = make_spec(num_classes=1000, scales=(1,), codec=codec)
    logits = np.random.default_rng(0).normal(0, 3, (5, 1, 1000)).astype(np.float32)
    rows = spec.codec.encode(logits, np.zeros((5, 1), np.int64))
    packed = ("classes", "block_counts", "values", "low", "high")
    classes, values = page["unpack_topk"](*(rows[name] for name in packed))
    moments = (rows[f"tail_{name}"].astype(np.float32) for name in ("mean", "var", "max", "lme"))
    found = page["decode_topk"](classes, values, *moments, 1000, 4.0)
    np.testing.assert_allclose(found, spec.decode(rows, temperature=4.0, head=None), rtol=1e-5)


def test_every_key_of_a_cache_is_in_the_list_of_keys():
    keys = PAGE.split("## 1. Keys")[1].split("## 2.")[0]
    for root in (DENSE, TOPK):
        for path in files_of(root):
            key = path.relative_to(root).as_posix()
            shape = re.sub(r"^commits/\d+/\d+\.json$", "commits/SEED/SHARD.json", key)
            shape = re.sub(r"^witness/c/\d+/\d+/0/0/0/0$", "witness/c/SEED/SHARD/0/0/0/0", shape)
            shape = re.sub(r"^[a-z_]+/c/\d+/\d+(/0)*$", "ARRAY/c/SEED/SHARD[/0...]", shape)
            shape = re.sub(r"^(?!commits)[a-z_]+/zarr\.json$", "ARRAY/zarr.json", shape)
            assert f"\n{shape} " in keys, key


def test_both_seals_can_be_checked_without_a_json_writer():
    text = (DENSE / "zarr.json").read_bytes()
    facts = json.loads(text)["attributes"]["kd_cache"]
    inner = canonical_json(facts)
    assert inner in text
    assert crc32c(inner.replace(b'"crc32c":%d,' % facts["crc32c"], b"", 1)) == facts["crc32c"]
    spec = text.split(b'"spec":')[1].split(b',"versions":')[0]
    assert sha256_hex(spec) == facts["fingerprint"]


def test_every_field_and_array_there_is_has_a_word_on_the_page():
    facts = json.loads((DENSE / "zarr.json").read_bytes())["attributes"]["kd_cache"]
    commit = json.loads((DENSE / "commits/0/0.json").read_bytes())
    names = {*facts, *commit, *commit["objects"]["sample"], *CacheSpec.model_fields}
    for codec in (
        {"kind": "int8"},
        {"kind": "topk", "k": 3},
        {"kind": "topk", "k": 3, "packed": True},
        {"kind": "features", "num_channels": 3},
        {"kind": "features", "num_channels": 3, "bits": 8},
    ):
        layout = CacheLayout(make_spec(codec=codec))
        names |= {*layout.names, *layout.heads, "witness", *codec}
    for part in ("dataset", "layout", "teacher", "recipe"):
        names |= set(facts["spec"][part])
    missing = sorted(name for name in names if f"`{name}`" not in PAGE)
    assert missing == []


def test_the_order_on_the_page_is_the_order_of_the_views():
    assert f"0x{ORDER_KEY:x}" in PAGE
    words = np.random.Philox(key=np.array([ORDER_KEY, 3], np.uint64)).random_raw(50)
    np.testing.assert_array_equal(np.argsort(words, kind="stable"), epoch_order(50, 3))


def test_the_limit_on_the_page_is_the_readers():
    assert f"no chunk over {MAX_PIECE_BYTES >> 20} MiB" in PAGE
