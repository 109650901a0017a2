"""A cache made by an enemy: refused before memory is taken or code is run, whatever fits."""

from __future__ import annotations

import json
import os

import pytest
from support.caches import (
    VERSIONS,
    make_rows,
    make_spec,
    make_witnesses,
    open_writer,
    write_cache,
)
from support.everything import Expected, outcome
from support.hostile import (
    bomb,
    plant_chunk,
    plant_witness,
    read_here,
    read_in_a_process,
    reseal_commit,
    reseal_root,
)

from cache_service.errors import KdCacheError
from cache_service.format.canonical import canonical_json
from cache_service.format.shard import pack
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import open_cache

MEMORY_BOUND = 64 << 20
"""Growth of a reader's peak memory while it refuses; a whole toy cache takes some 3 MiB."""

GIB = 1 << 30


@pytest.fixture
def cache(tmp_path):
    """One compressed shard of one chunk: 32 rows."""
    spec = make_spec(codec={"kind": "dense", "compression": "zstd"}, num_samples=32, chunk_rows=32)
    write_cache(str(tmp_path), spec)
    return tmp_path, spec


def refused(root, says="", *, read=read_here):
    said, grown = read(root)
    assert said != "whole"
    assert says in said
    assert grown < MEMORY_BOUND, f"{said}; {grown >> 20} MiB"


def test_the_toy_itself_is_whole(cache):
    assert read_in_a_process(cache[0])[0] == "whole"


@pytest.mark.parametrize("declared", ["none", "64 GiB", "right"])
@pytest.mark.parametrize("where", ["chunk", "witness"])
def test_a_frame_that_unpacks_to_64_gib_is_refused_in_little_memory(cache, declared, where):
    root, _ = cache
    right = 32 * 16 * 10 * 2 if where == "chunk" else 4 * 8 * 8 * 3
    size = {"none": None, "64 GiB": 64 * GIB, "right": right}[declared]
    frame = bomb(64 * GIB, declared=size)
    # Far longer than a packed chunk can be, it is refused by its size already ...
    plant = {
        "chunk": lambda frame: plant_chunk(root, "logits/c/0/0/0/0", frame),
        "witness": lambda frame: plant_witness(root, frame),
    }[where]
    plant(frame)
    refused(root, "the commit gives", read=read_in_a_process)
    # ... and one short enough by what it unpacks to.
    plant(bomb(24 << 20, declared=size))
    refused(root, "does not unpack to", read=read_in_a_process)


def test_a_frame_that_unpacks_to_less_is_not_filled_with_zeros(cache):
    root, _ = cache
    plant_chunk(root, "logits/c/0/0/0/0", pack(bytes(100)))
    refused(root, f"does not unpack to {32 * 16 * 10 * 2} bytes")


@pytest.mark.parametrize(
    "change",
    [
        {"teacher": {"num_classes": 10**9}},
        {"teacher": {"num_classes": 2**24}},
        {"dataset": {"num_samples": 10**12}},
        {"layout": {"chunk_rows": 2**20, "shard_rows": 2**20}},
        {"recipe": {"size": 10**6}},
        {"scales": list(range(1, 65)), "stored_scales": list(range(1, 65))},
        {"codec": {"kind": "pickle"}},
        {"codec": {"kind": "dense", "compression": "blosc"}},
        {"codec": {"kind": "features", "compression": "none", "num_channels": 10**9}},
    ],
    ids=str,
)
def test_a_spec_of_a_billion_is_refused_before_memory_is_taken(cache, change):
    root, _ = cache

    def enlarge(facts):
        for part, values in change.items():
            if isinstance(values, dict) and part != "codec":
                facts["spec"][part] |= values
            else:
                facts["spec"][part] = values
        try:
            facts["fingerprint"] = CacheSpec.model_validate(facts["spec"]).fingerprint
        except ValueError:
            facts["fingerprint"] = "0" * 64

    reseal_root(root, enlarge)
    refused(root)


@pytest.mark.parametrize("sample", [-1, 32, 2**31 - 1])
def test_an_order_that_names_samples_outside_the_dataset_is_refused(cache, sample, tmp_path):
    _, spec = cache
    check_order(tmp_path / "other", spec, lambda order: order.__setitem__(5, sample))


def test_an_order_that_names_a_sample_twice_is_refused(cache, tmp_path):
    _, spec = cache
    spec = make_spec(num_samples=64)
    check_order(tmp_path / "other", spec, lambda order: order.__setitem__(40, order[3]))


def check_order(root, spec, change):
    writer = open_writer(str(root), spec)
    rows = make_rows(spec, 0)
    change(rows["sample"])
    for shard in range(spec.num_shards):
        start, stop = spec.shard_range(shard)
        part = {name: values[start:stop] for name, values in rows.items()}
        writer.write_shard(0, shard, part, make_witnesses(spec, 0, shard), VERSIONS)
    with pytest.raises(KdCacheError, match="names samples that are not in the dataset, or twice"):
        open_cache(str(root)).lookup(0, rows["sample"][:1].astype("int64"))


@pytest.mark.parametrize(
    "change",
    [
        {"size": 64 * GIB},
        {"chunk_sizes": [64 * GIB]},
        {"chunk_sizes": [-8]},
        {"chunk_sizes": []},
        {"chunk_sizes": [1] * 9_000, "chunk_crc32c": [0] * 9_000},
        {"chunk_sizes": "all"},
        {"chunk_crc32c": [1e300]},
    ],
    ids=lambda change: str(change)[:40],
)
@pytest.mark.parametrize("name", ["logits", "witness"])
def test_a_commit_to_an_impossible_object_is_refused(cache, name, change):
    root, _ = cache
    reseal_commit(root, lambda document: document["objects"][name].update(change))
    refused(root, "corrupt: ")


def test_a_commit_to_a_hole_of_64_gib_is_refused(cache):
    root, _ = cache
    path = root / "logits/c/0/0/0/0"
    os.truncate(path, 64 * GIB)  # sparse: takes no disk
    held = 64 * GIB - 24
    reseal_commit(
        root,
        lambda document: document["objects"]["logits"].update(
            {"size": 64 * GIB, "chunk_sizes": [held]}
        ),
    )
    refused(root, "the commit gives", read=read_in_a_process)


@pytest.mark.parametrize(
    "change",
    [
        {"data_type": "object"},
        {"data_type": {"name": "numpy.datetime64"}},
        {"codecs": [{"name": "numcodecs.pickle"}]},
        {"codecs": [{"name": "bytes"}]},
        {"shape": [10**9, 10**9, 10**9]},
        {"shape": ["1"]},
        {"shape": None},
        {"shape": []},
        {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 2**40]}}},
        {"fill_value": "0x7fc00000"},
        {"storage_transformers": [{"name": "x"}]},
        {"attributes": {"_ARRAY_DIMENSIONS": 3}},
    ],
    ids=str,
)
def test_metadata_that_the_spec_does_not_give_is_refused(cache, change):
    root, _ = cache
    path = root / "logits/zarr.json"
    path.write_bytes(canonical_json(json.loads(path.read_bytes()) | change))
    refused(root, "logits/zarr.json is missing or does not describe this cache")


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 10**6,
        b'{"shape":' * 10**5,
        b'{"shape":[Infinity]}',
        b'{"shape":[NaN]}',
        b'{"shape":[1e999]}',
        b'{"shape":[' + b"9" * 10_000 + b"]}",
        b"\xff",
        b"null",
        b"3",
    ],
    ids=lambda content: ascii(content[:16]),
)
@pytest.mark.parametrize("key", ["zarr.json", "logits/zarr.json", "commits/0/0.json"])
def test_documents_that_break_parsers_are_refused(cache, key, content):
    root, spec = cache
    (root / key).write_bytes(content)
    said = outcome(str(root), Expected(spec, 1))
    assert said.startswith(("corrupt: ", "not_a_cache: "))


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999"])
def test_a_number_that_json_does_not_have_is_refused_in_the_attributes(cache, number):
    root, spec = cache
    content = (root / "zarr.json").read_bytes()
    (root / "zarr.json").write_bytes(content.replace(b'"mean":[0.5,', b'"mean":[' + number + b","))
    assert outcome(str(root), Expected(spec, 1)).startswith("corrupt: ")
