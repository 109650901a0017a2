"""Bytes that are not those that were committed yield an error that names them, never numbers."""

from __future__ import annotations

import shutil

import pytest
from support.caches import make_spec, write_cache
from support.damage import changed, exchange, flip_and_read
from support.everything import Expected, files_of, outcome

from cache_service.format.layout import CacheLayout
from cache_service.format.shard import index_size, with_crc

CODECS = {
    "dense": {"kind": "dense"},
    "topk-zstd": {"kind": "topk", "k": 4, "compression": "zstd"},
    "features": {"kind": "features", "num_channels": 6},
}


@pytest.fixture(scope="module", params=CODECS.values(), ids=CODECS.keys())
def written(request, tmp_path_factory):
    """Two seeds of three shards, and another teacher's cache of the same layout."""
    spec = make_spec(codec=request.param, num_samples=40, shard_rows=16)
    root = tmp_path_factory.mktemp("cache")
    write_cache(str(root), spec, range(2))
    other = make_spec(codec=request.param, num_samples=40, shard_rows=16, weights="b" * 64)
    other_root = tmp_path_factory.mktemp("other")
    write_cache(str(other_root), other, range(2), salt=70)
    return root, other_root, Expected(spec, 2)


@pytest.fixture
def cache(written, tmp_path):
    """Copies of both, to be damaged."""
    root, other_root, expected = written
    shutil.copytree(root, tmp_path / "cache")
    shutil.copytree(other_root, tmp_path / "other")
    return tmp_path / "cache", tmp_path / "other", expected


# --- flips -----------------------------------------------------------------------------------


def check_flips(cache, flips, seed):
    root, _, expected = cache
    assert outcome(str(root), expected) == "whole"
    said = flip_and_read(root, expected, flips=flips, seed=seed)
    assert said["wrong"] == 0
    # Only the commits' own group document may change unseen: no row depends on it.
    assert said["refused"] >= 0.9 * flips


def test_a_flipped_bit_anywhere_is_refused_never_read(cache):
    check_flips(cache, flips=60, seed=0)


@pytest.mark.faults
def test_of_500_flipped_bits_none_is_read(cache):
    check_flips(cache, flips=500, seed=1)


def test_a_flipped_bit_in_an_index_is_refused_though_our_reader_finds_chunks_without_it(cache):
    root, _, expected = cache
    spec = expected.spec
    for array in CacheLayout(spec).arrays:
        path = root / CacheLayout(spec).object_key(array.name, 0, 0)
        for back in (1, 4, 5, 12, index_size(spec.layout.shard_rows // spec.layout.chunk_rows)):
            content = bytearray(path.read_bytes())
            content[-back] ^= 1
            with changed(path, bytes(content)):
                said = outcome(str(root), expected)
            assert said.startswith("corrupt: the index of ")
            assert path.relative_to(root).as_posix() in said


# --- cuts and holes --------------------------------------------------------------------------


def test_every_file_cut_short_emptied_or_lost_is_refused_by_name(cache):
    root, _, expected = cache
    for path in files_of(root):
        key = path.relative_to(root).as_posix()
        if "/c/1/" in key:
            continue  # the second seed's objects are like the first's
        content = path.read_bytes()
        for left in (None, b"", content[: len(content) // 2], content[:-1], content + b"\0"):
            with changed(path, left):
                said = outcome(str(root), expected)
            if key == "commits/zarr.json":
                assert said == "whole"
            elif key == "zarr.json":
                assert said.startswith("not_a_cache: " if left is None else ("not_a", "corrupt"))
            elif left is None and key.startswith("commits/"):
                shard = int(key.split("/")[2].removesuffix(".json"))
                start, stop = expected.spec.shard_range(shard)
                seed = key.split("/")[1]
                # The rows are gone, and that is what is said: build records them again.
                assert said.startswith("rows_not_built: ")
                assert f"positions [{start}, {stop}) of seed {seed}" in said
            else:
                assert said.startswith("corrupt: "), (key, said)
                assert key in said


# --- bytes in the wrong place ----------------------------------------------------------------


def data_files(root, spec, seed, shard):
    return [root / key for key in CacheLayout(spec).object_keys(seed, shard).values()]


def test_a_shard_in_the_place_of_another_is_refused_by_name(cache):
    root, other, expected = cache
    spec = expected.spec
    for path, same_seed, other_seed, other_cache in zip(
        data_files(root, spec, 0, 0),
        data_files(root, spec, 0, 1),
        data_files(root, spec, 1, 0),
        data_files(other, spec, 0, 0),
        strict=True,
    ):
        for source in (same_seed, other_seed, other_cache):
            content = source.read_bytes()
            with changed(path, content):
                said = outcome(str(root), expected)
            assert said.startswith("corrupt: "), (path, said)
            assert path.relative_to(root).as_posix() in said


def test_two_shards_exchanged_with_their_commits_are_refused(cache):
    root, _, expected = cache
    for here, there in (((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 2), (1, 2))):
        pairs = [
            *zip(
                data_files(root, expected.spec, *here),
                data_files(root, expected.spec, *there),
                strict=True,
            ),
            (
                root / f"commits/{here[0]}/{here[1]}.json",
                root / f"commits/{there[0]}/{there[1]}.json",
            ),
        ]
        for pair in pairs:
            exchange(*pair)
        said = outcome(str(root), expected)
        assert said.startswith("corrupt: commit commits/0/")
        assert "it was moved or copied here" in said
        for pair in pairs:
            exchange(*pair)
    assert outcome(str(root), expected) == "whole"


def test_a_commit_of_another_cache_is_refused_by_its_fingerprint(cache):
    root, other, expected = cache
    with changed(root / "commits/1/2.json", (other / "commits/1/2.json").read_bytes()):
        said = outcome(str(root), expected)
    assert said.startswith("corrupt: commit commits/1/2.json says fingerprint=")


def test_a_whole_shard_of_another_cache_is_refused_by_its_fingerprint(cache):
    root, other, expected = cache
    for source in [*data_files(other, expected.spec, 0, 1), other / "commits/0/1.json"]:
        shutil.copyfile(source, root / source.relative_to(other))
    said = outcome(str(root), expected)
    assert said.startswith("corrupt: commit commits/0/1.json says fingerprint=")


def test_the_root_document_of_another_cache_makes_every_commit_foreign(cache):
    root, other, expected = cache
    shutil.copyfile(other / "zarr.json", root / "zarr.json")
    assert "says fingerprint=" in outcome(str(root), expected)


def test_the_document_of_another_array_is_refused(cache):
    root, _, expected = cache
    with changed(root / "digest/zarr.json", (root / "origin/zarr.json").read_bytes()):
        assert outcome(str(root), expected) == "whole", "they differ in their name alone"
    with changed(root / "digest/zarr.json", (root / "sample/zarr.json").read_bytes()):
        said = outcome(str(root), expected)
    assert "digest/zarr.json is missing or does not describe this cache" in said


def test_the_head_of_another_cache_is_refused(tmp_path):
    spec = make_spec(codec=CODECS["features"], num_samples=40, shard_rows=16)
    write_cache(str(tmp_path), spec, range(1))
    expected = Expected(spec, 1)
    path = tmp_path / "head_weight/c/0/0"
    values = bytearray(path.read_bytes()[:-4])
    values[3] ^= 1
    # Whole in itself: only the root document knows that these are not the weights.
    with changed(path, with_crc(bytes(values))):
        said = outcome(str(tmp_path), expected)
    assert said.startswith("corrupt: ")
    assert "head_weight/c/0/0 is not what was committed" in said


def test_two_arrays_of_one_type_exchanged_are_refused(tmp_path):
    spec = make_spec(
        codec=CODECS["topk-zstd"] | {"compression": "none"}, num_samples=40, shard_rows=16
    )
    write_cache(str(tmp_path), spec, range(1))
    exchange(tmp_path / "tail_mean/c/0/1/0", tmp_path / "tail_max/c/0/1/0")
    said = outcome(str(tmp_path), Expected(spec, 1))
    assert said.startswith("corrupt: ")
    assert "tail_mean/c/0/1/0" in said
