"""Caches that version 1 of the format wrote, and that every later version must read.

If a test here fails, people's caches would be lost: undo the change, or raise FORMAT_VERSION and
keep reading version 1. The files are written by `python -m support.golden` in `tests/`.
"""

from __future__ import annotations

import json

import pytest
from support import golden
from support.everything import files_of, same_rows

from cache_service.rows.reader import open_cache


@pytest.mark.parametrize("name", golden.CODECS)
def test_the_golden_cache_still_reads_to_the_known_values(name):
    known = json.loads(golden.KNOWN.read_text())[name]
    assert golden.known_values(name, golden.FOLDER / name) == known


@pytest.mark.parametrize("name", golden.CODECS)
def test_every_golden_row_is_what_was_recorded(name):
    spec = golden.golden_spec(name)
    cache = open_cache(str(golden.FOLDER / name))
    assert cache.spec == spec
    assert cache.complete_seeds() == [0, 1]
    for seed in golden.SEEDS:
        assert same_rows(cache.read(seed, 0, 20), golden.golden_rows(spec, seed), slice(None))
        for shard in range(spec.num_shards):
            wanted = golden.golden_witnesses(spec, seed, shard)
            assert cache.witnesses(seed, shard).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("name", golden.CODECS)
def test_writing_the_golden_cache_again_gives_the_same_bytes(name, tmp_path):
    golden.write(name, tmp_path)
    wanted = {
        path.relative_to(golden.FOLDER / name): path.read_bytes()
        for path in files_of(golden.FOLDER / name)
    }
    assert {path.relative_to(tmp_path): path.read_bytes() for path in files_of(tmp_path)} == wanted


def test_the_golden_caches_stay_small():
    assert sum(path.stat().st_size for path in files_of(golden.FOLDER)) <= 60_000
