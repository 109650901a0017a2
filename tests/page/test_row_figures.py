"""The figures of a row are what the cache holds, by the definitions that training uses."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from support.caches import make_rows, make_spec, write_cache
from support.html_page import Page

from cache_service.api.page.explorer import stored_views
from cache_service.api.page.row_figures import (
    cell_logits,
    find_row,
    first_recorded,
    position_of,
    row_figures,
)
from cache_service.errors import CorruptError, RowsNotBuiltError
from cache_service.format.cells import expand_cells
from cache_service.rows.reader import open_cache
from distill.losses import sdd_weights

CODECS = [
    {"kind": "dense"},
    {"kind": "int8"},
    {"kind": "topk", "k": 4},
    {"kind": "features", "num_channels": 6},
]


@pytest.fixture(scope="module")
def plain(root):
    return open_cache(str(root / "plain"))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec["kind"])
def test_probabilities_follow_from_the_stored_row(tmp_path, codec):
    spec = make_spec(codec=codec)
    write_cache(str(tmp_path / "c"), spec)
    cache = open_cache(str(tmp_path / "c"))
    rows = cache.read(0, 5, 6)
    logits = cell_logits(spec, rows, cache.head())
    assert logits.shape == (21, 10)
    figures = row_figures(spec, logits, 3)
    wanted = torch.from_numpy(logits).double().softmax(dim=1)
    assert figures.likeliest[0].probability == pytest.approx(wanted[0].max().item())
    assert [each.label for each in figures.likeliest] == wanted[0].argsort(descending=True)[
        :5
    ].tolist()
    shown = [cell.target_probability for cells in figures.grids.values() for cell in cells]
    assert shown == pytest.approx(wanted[:, 3].tolist())
    assert figures.whole.logit == pytest.approx(float(logits[0, 3]))


def test_complementary_cells_are_those_that_training_counts_double():
    spec = make_spec()
    rows = make_rows(spec, 0)
    stored = spec.decode(rows, head=None)
    cells = expand_cells(stored, spec.scales, spec.stored_scales)
    for position in range(20):
        for label in range(10):
            logits = cells[position : position + 1]
            weights = sdd_weights(torch.from_numpy(logits), torch.tensor([label]))[0]
            shown = [
                cell.complementary
                for cells in row_figures(spec, logits[0], label).grids.values()
                for cell in cells
            ]
            assert shown == (weights > 1).tolist()


def test_without_a_label_the_maps_show_the_prediction_and_mark_nothing():
    spec = make_spec()
    logits = np.random.default_rng(0).normal(size=(21, 10)).astype(np.float32)
    figures = row_figures(spec, logits, None)
    assert figures.target == int(logits[0].argmax())
    assert figures.target_rank == 1
    assert {cell.complementary for cells in figures.grids.values() for cell in cells} == {None}


def test_a_sample_is_found_at_its_position_under_every_seed(plain):
    commits = plain.commits()
    for seed in (0, 1):
        rows = plain.read(seed, 0, 96)
        for sample in (0, 1, 50, 95):
            row = find_row(plain, commits, seed, sample)
            assert rows["sample"][row.position] == sample
            assert row.digest == rows["digest"][row.position]


def test_rows_that_are_not_there_are_refused_with_what_to_do(plain):
    commits = plain.commits()
    with pytest.raises(RowsNotBuiltError, match="samples 0 to 95"):
        find_row(plain, commits, 0, 96)
    with pytest.raises(RowsNotBuiltError, match=r"not recorded yet.*Complete seeds: 0:2"):
        find_row(plain, commits, 7, 0)


def test_a_cache_whose_order_is_not_its_seeds_is_refused(root):
    partial = open_cache(str(root / "partial"))
    commits = partial.commits()
    sample = next(
        sample
        for sample in range(100)
        if (place := position_of(partial.spec, 0, sample)) < 64
        and partial.read(0, place, place + 1)["sample"][0] != sample
    )
    with pytest.raises(CorruptError, match="holds sample"):
        find_row(partial, commits, 0, sample)


def test_a_few_views_of_each_shard_are_stored_as_pixels(plain):
    commits = plain.commits()
    rows = [find_row(plain, commits, 0, sample) for sample in range(96)]
    stored = [row for row in rows if row.sample in stored_views(plain, row)]
    assert len(stored) == 3 * 4


def test_looking_begins_where_something_is_recorded(root, plain):
    assert first_recorded(plain.spec, plain.commits()) == (0, 0)
    assert first_recorded(plain.spec, {}) is None
    seed, sample = first_recorded(plain.spec, {1: [2]})
    assert seed == 1
    assert 64 <= position_of(plain.spec, 1, sample) < 96


def test_the_pages_numbers_are_the_rows(pages, plain):
    html = pages.explore("plain", "1", "17").html
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == []
    row = find_row(plain, plain.commits(), 1, 17)
    expected = torch.from_numpy(row.logits_RC).double().softmax(dim=1)
    label = 17 % 5
    shown = re.findall(
        r'<tr data-cell="\d-\d-\d"><th.*?</th><td>(\w+)</td><td>([\d.]+)</td><td>([\d.]+)</td>'
        r"<td>([-\d.]+)</td>",
        html,
    )
    assert len(shown) == 21
    for (prediction, top, target, logit), probabilities, logits in zip(
        shown, expected, row.logits_RC, strict=True
    ):
        assert prediction == f"place{int(probabilities.argmax())}"
        assert float(top) == pytest.approx(float(probabilities.max()), abs=6e-5)
        assert float(target) == pytest.approx(float(probabilities[label]), abs=6e-5)
        assert float(logit) == pytest.approx(float(logits[label]), abs=6e-4)
    assert f"position {row.position}, shard {row.shard}" in html
    assert f"{row.digest:016x}" in html
