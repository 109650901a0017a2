"""Zarr libraries open a cache with no code of ours, and see the same numbers."""

from __future__ import annotations

import numpy as np
import pytest
import tensorstore
import xarray
import zarr
from support.caches import make_head, make_rows, make_spec, make_witnesses, write_cache

from cache_service.format.layout import CacheLayout

CODECS = {
    "dense": {"kind": "dense"},
    "dense-zstd": {"kind": "dense", "compression": "zstd"},
    "int8": {"kind": "int8", "compression": "zstd"},
    "topk": {"kind": "topk", "k": 4},
    "features": {"kind": "features", "num_channels": 6},
}


@pytest.fixture(params=CODECS.values(), ids=CODECS.keys())
def cache(request, tmp_path):
    spec = make_spec(codec=request.param)
    write_cache(str(tmp_path / "cache"), spec, range(2))
    return tmp_path / "cache", spec


def test_zarr_python_reads_every_row_and_witness(cache):
    path, spec = cache
    group = zarr.open_group(path, mode="r")
    for seed in range(2):
        rows = make_rows(spec, seed)
        for name, values in rows.items():
            np.testing.assert_array_equal(group[name][seed], values)
        for shard in range(spec.num_shards):
            np.testing.assert_array_equal(
                group["witness"][seed, shard], make_witnesses(spec, seed, shard)
            )


def test_zarr_python_reads_the_head(tmp_path):
    spec = make_spec(codec=CODECS["features"])
    write_cache(str(tmp_path), spec)
    head = make_head(spec)
    group = zarr.open_group(tmp_path, mode="r")
    np.testing.assert_array_equal(group["head_weight"][:], head.weight_CD)
    np.testing.assert_array_equal(group["head_bias"][:], head.bias_C)


def test_tensorstore_reads_every_row(cache):
    path, spec = cache
    rows = make_rows(spec, 1)
    for array in CacheLayout(spec).arrays:
        store = tensorstore.open(
            {"driver": "zarr3", "kvstore": f"file://{path}/{array.name}"}, open=True
        ).result()
        np.testing.assert_array_equal(store[1].read().result(), rows[array.name])


def test_xarray_opens_the_group_with_named_dimensions(cache):
    path, spec = cache
    dataset = xarray.open_zarr(path, consolidated=False, mask_and_scale=False)
    assert dataset["sample"].dims == ("seed", "position")
    for name, values in make_rows(spec, 0).items():
        np.testing.assert_array_equal(dataset[name].values[0], values)


def test_a_hole_reads_as_nan_for_a_reader_that_knows_no_commits(tmp_path):
    spec = make_spec()
    write_cache(str(tmp_path), spec, range(1, 2))
    assert np.isnan(zarr.open_group(tmp_path, mode="r")["logits"][0]).all()
