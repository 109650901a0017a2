"""Damage is called damage, keeps the way on, and is marked until the cache changes."""

from __future__ import annotations

import os
import re
import shutil
import time

import pytest
from support.caches import make_rows, make_spec, open_writer, write_shard
from support.damage import damage_rows
from support.html_page import Page
from support.page_service import PageService, no_images
from support.serving import serving

from cache_service.views.order import epoch_order


@pytest.fixture
def damaged(tmp_path, root):
    """`rows` has damaged rows, `root` a damaged root document, `good` is intact."""
    for name in ("rows", "root", "good"):
        shutil.copytree(root / "plain", tmp_path / name)
    damage_rows(tmp_path / "rows")
    file = tmp_path / "root" / "zarr.json"
    file.write_text(file.read_text().replace("support.toys", "support.toyz"))
    for path in (*tmp_path.rglob("commits/*"), file):  # long ago: found after the last change
        os.utime(path, (1e9, 1e9))
    return tmp_path


@pytest.fixture
def pages(damaged):
    made = PageService(damaged).pages(renderer=no_images())
    yield made
    made.close()


def links(page):
    found = Page()
    found.feed(page.html)
    assert found.open == []
    return [attributes.get("href") for attributes in found.all("a")]


def marked(pages):
    """Names of the caches that the overview marks as damaged."""
    rows = re.findall(r'<tr role="row">.*?</tr>', pages.overview().html, re.DOTALL)
    return [
        re.search(r'title="([^"]+)"', row)[1]
        for row in rows
        if '<span class="pill bad">damaged</span>' in row
    ]


def test_a_damaged_row_is_called_damage_and_the_page_keeps_its_ways(pages):
    page = pages.explore("rows", "0", "5")
    assert page.status == 500
    assert "Damage: the row of this view is not what was recorded." in page.html
    assert "kd-cache verify" in page.html
    for href in ("/", "/caches/rows", "?seed=0&sample=4", "?seed=0&sample=6", "?seed=1&sample=5"):
        assert href in links(page)
    assert 'name="sample"' in page.html


def test_a_damaged_cache_has_a_page_that_says_so_and_leads_back(damaged):
    with serving(damaged) as service:
        answer = service.ask("GET", "/caches/root")
        assert answer.status == 500
        html = answer.data.decode()
    assert re.search(r"<h1>Damage in root</h1>", html)
    assert 'aria-label="Place"><a href="../">Caches</a>' in html
    assert "Refused" not in html


def test_damage_is_marked_on_the_overview_and_on_the_caches_page_once_it_was_found(pages):
    assert marked(pages) == ["root"]
    pages.explore("rows", "0", "5")
    assert marked(pages) == ["root", "rows"]
    assert "Damage was found in this cache" in pages.cache("rows").html
    assert "Damage" not in pages.cache("good").html


def test_damage_that_a_client_meets_counts_too_and_the_metric_says_how_many_caches(damaged):
    def figure(service):
        text = service.ask("GET", "/metrics").data.decode()
        return float(re.search(r"^kdcache_damaged_caches (\S+)$", text, re.MULTILINE)[1])

    with serving(damaged) as service:
        assert figure(service) == 0
        answer = service.ask("GET", "/v1/caches/rows/rows?seed=0&start=0&stop=4")
        assert answer.status == 500
        assert figure(service) == 1
        assert "damaged</span>" in service.ask("GET", "/").data.decode()
        assert figure(service) == 2  # the overview opened the other one, too


def test_the_mark_goes_when_the_cache_changes_and_comes_back_if_damage_is_still_there(
    damaged, pages
):
    pages.explore("rows", "0", "5")
    assert "rows" in marked(pages)
    later = time.time() + 1
    os.utime(damaged / "rows" / "commits" / "1", (later, later))  # as recording a shard does
    assert "rows" not in marked(pages)
    os.utime(damaged / "rows" / "commits" / "1", (1e9, 1e9))
    pages.explore("rows", "0", "5")
    assert "rows" in marked(pages)


def test_damage_of_another_seed_leaves_the_sample_and_is_said(tmp_path):
    spec = make_spec()
    writer = open_writer(str(tmp_path / "c"), spec, num_seeds=2)
    for seed in (0, 1):
        rows = make_rows(spec, seed) | {"sample": epoch_order(100, seed).astype("<i4")}
        for shard in range(spec.num_shards):
            write_shard(writer, seed, shard, rows=rows)
    damage_rows(tmp_path / "c", seeds=(1,))
    pages = PageService(tmp_path).pages(renderer=no_images())
    try:
        page = pages.explore("c", "0", "5")
        assert page.status == 200
        assert "Damage in other parts of this cache." in page.html
        assert page.html.count("data-cell=") == 21
        assert marked(pages) == ["c"]
    finally:
        pages.close()
