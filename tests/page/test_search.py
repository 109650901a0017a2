"""Samples worth a look are found in the recorded rows, within bounds that the page names."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from support.caches import make_spec, write_cache
from support.html_page import Page
from support.page_service import PageService, no_images
from support.serving import serving
from support.toys import patches

from cache_service.api.page.finder import find_class
from cache_service.api.page.search import (
    NUM_FOUND,
    differing,
    least_certain,
    most_classes,
    predicted_as,
    scan_rows,
)
from cache_service.errors import ConfigError, RowsNotBuiltError
from cache_service.format.cells import expand_cells
from cache_service.rows.reader import open_cache

LABELS = np.array(patches(num_samples=96).targets)


@pytest.fixture(scope="module")
def plain(root):
    return open_cache(str(root / "plain"))


@pytest.fixture(scope="module")
def everything(plain):
    """Samples, logits of all cells and probabilities of the whole view, of seed 0, in order."""
    rows = plain.read(0, 0, 96)
    cells = expand_cells(plain.spec.decode(rows, head=None), (1, 2, 4), plain.spec.stored_scales)
    powers = np.exp(cells[:, 0].astype(np.float64))
    return rows["sample"], cells, powers / powers.sum(axis=1, keepdims=True)


@pytest.fixture
def without_images(root):
    made = PageService(root).pages(renderer=no_images())
    yield made
    made.close()


def test_the_rankings_are_those_of_all_rows(plain, everything):
    samples, cells, probabilities = everything
    scan = scan_rows(plain, plain.commits(), 0, 0)
    assert scan.samples_N.tolist() == samples.tolist()
    assert scan.next_start is None
    top = probabilities.max(axis=1)
    assert top[least_certain(scan)] == pytest.approx(np.sort(top)[:NUM_FOUND])
    distinct = np.array([len(set(row)) for row in cells[:, 5:].argmax(axis=2).tolist()])
    assert distinct[most_classes(scan)].tolist() == np.sort(distinct)[::-1][:NUM_FOUND].tolist()
    for label in range(5):
        rows = predicted_as(scan, label)
        wanted = np.flatnonzero(probabilities.argmax(axis=1) == label)
        assert set(rows) <= set(wanted)
        assert len(rows) == min(len(wanted), NUM_FOUND)
        assert (np.diff(top[rows]) <= 1e-6).all()


def test_what_differs_is_neither_label_of_the_view(plain, everything):
    samples, _, probabilities = everything
    scan = scan_rows(plain, plain.commits(), 0, 0)
    tops = probabilities.argmax(axis=1)
    labels = np.stack([LABELS[samples]] * 2, axis=1)
    wrong = tops != LABELS[samples]
    rows = differing(scan, labels)
    assert wrong[rows].all()
    assert len(rows) == min(wrong.sum(), NUM_FOUND)
    labels[:, 1] = tops  # what was mixed in is what the teacher says
    assert len(differing(scan, labels)) == 0


def test_a_search_ends_at_its_limits_and_goes_on_where_it_ended(plain, everything):
    commits, seen, start = plain.commits(), [], 0
    while start is not None:
        scan = scan_rows(plain, commits, 0, start, max_rows=32)
        assert len(scan.samples_N) == 32
        seen += scan.samples_N.tolist()
        start = scan.next_start
    assert seen == everything[0].tolist()
    first = scan_rows(plain, commits, 0, 0, max_s=0.0)
    assert len(first.samples_N) == 32  # one step: to the end of a shard of 32 rows
    assert first.next_start == 32


def test_only_what_is_recorded_is_searched(root):
    partial = open_cache(str(root / "partial"))
    scan = scan_rows(partial, partial.commits(), 2, 0)
    assert scan.positions_N.tolist() == list(range(96, 100))
    assert len(scan_rows(partial, partial.commits(), 1, 0).positions_N) == 0
    assert len(scan_rows(partial, partial.commits(), 2, 1000).positions_N) == 0


def test_memory_is_bounded_however_many_classes_there_are(tmp_path, monkeypatch):
    spec = make_spec(num_classes=1000, num_samples=64)
    write_cache(str(tmp_path / "c"), spec)
    cache, sizes = open_cache(str(tmp_path / "c")), []
    read = cache.read
    cache.read = lambda seed, a, b: sizes.append(b - a) or read(seed, a, b)
    monkeypatch.setattr("cache_service.api.page.search.STEP_LOGITS", 21 * 1000 * 10)
    scan = scan_rows(cache, cache.commits(), 0, 0)
    assert max(sizes) == 10
    assert len(scan.positions_N) == 64


def test_damaged_rows_are_left_out_and_said(root, tmp_path):
    shutil.copytree(root / "plain", tmp_path / "c")
    cache = open_cache(str(tmp_path / "c"))
    path = tmp_path / "c" / cache.layout.object_key("logits", 0, 1)
    content = bytearray(path.read_bytes())
    content[::64] = bytes(byte ^ 1 for byte in content[::64])
    path.write_bytes(content)
    scan = scan_rows(cache, cache.commits(), 0, 0)
    assert scan.damage is not None
    assert not set(range(32, 64)) & set(scan.positions_N.tolist())
    assert len(scan.positions_N) == 64
    pages = PageService(tmp_path).pages(renderer=no_images())
    html = pages.find("c", "uncertain", "0", "", "").html
    assert "Damage: some rows are not what was recorded, and are left out." in html
    assert '<span class="pill bad">damaged</span>' in pages.overview().html
    pages.close()


def links_of(page, text):
    found = Page()
    found.feed(page.html)
    assert found.open == []
    return [a["href"] for a in found.all("a") if text in a.get("href", "")]


@pytest.mark.parametrize("by", ["uncertain", "disagree", "differ", "class"])
def test_the_page_shows_samples_with_images_and_says_what_was_searched(pages, everything, by):
    samples, _, probabilities = everything
    tops = dict(zip(samples.tolist(), probabilities.argmax(axis=1).tolist(), strict=True))
    page = pages.find("plain", by, "0", "", f"place{tops[0]}" if by == "class" else "")
    assert re.search(r"Searched: 96 of the 96 recorded rows of seed 0, in \d\.\d s", page.html)
    found = [int(re.search(r"sample=(\d+)", href)[1]) for href in links_of(page, "sample=")]
    assert 0 < len(found) <= NUM_FOUND
    assert page.html.count("data:image/png;base64,") == len(found)
    if by == "class":
        assert {tops[sample] for sample in found} == {tops[0]}
    if by == "differ":
        assert all(tops[sample] != LABELS[sample] for sample in found)
    for sample in found:
        assert f"teacher: place{tops[sample]}," in page.html
        assert f"label: place{LABELS[sample]}<" in page.html


def test_a_mixed_view_differs_only_if_neither_of_its_labels_is_predicted(pages, root):
    page = pages.find("mixed", "differ", "0", "", "")
    cache = open_cache(str(root / "mixed"))
    rows = cache.read(0, 0, 96)
    stored = cache.spec.decode(rows, head=None)
    tops = expand_cells(stored, (1, 2), cache.spec.stored_scales)[:, 0].argmax(axis=1)
    samples = rows["sample"].tolist()
    for href in links_of(page, "sample="):
        position = samples.index(int(re.search(r"sample=(\d+)", href)[1]))
        pair = {LABELS[samples[position]], LABELS[samples[position ^ 1]]}
        assert tops[position] not in pair


def test_every_page_of_a_cache_leads_to_them(pages):
    for page in (pages.cache("plain"), pages.explore("plain", "0", "3")):
        ways = {re.search(r"by=(\w+)", href)[1] for href in links_of(page, "/find?")}
        assert ways == {"random", "uncertain", "disagree", "differ"}
        assert 'name="class"' in page.html


def test_without_the_dataset_rows_are_found_and_what_needs_it_says_so(without_images, everything):
    page = without_images.find("plain", "uncertain", "0", "", "")
    assert len(links_of(page, "sample=")) == NUM_FOUND
    assert "teacher: class " in page.html
    assert "images and labels are not shown" in page.html
    page = without_images.find("plain", "differ", "0", "", "")
    assert "This search needs the dataset." in page.html
    assert links_of(page, "sample=") == []
    predicted = str(int(everything[2][0].argmax()))
    assert links_of(without_images.find("plain", "class", "0", "", predicted), "sample=")
    by_name = without_images.find("plain", "class", "0", "", "place3")
    assert "This search needs the dataset." in by_name.html


def test_without_cells_none_disagree(tmp_path):
    write_cache(str(tmp_path / "c"), make_spec(scales=(1,)))
    pages = PageService(tmp_path).pages(renderer=no_images())
    page = pages.find("c", "disagree", "0", "", "")
    pages.close()
    assert "This cache holds no cells besides the whole view" in page.html
    assert links_of(page, "sample=") == []
    assert "needs the dataset" not in page.html


def test_a_random_sample_is_a_recorded_one_and_another_one_each_time(root):
    with serving(root) as service:
        targets = set()
        for _ in range(8):
            answer = service.ask("GET", "/caches/partial/find?by=random")
            assert answer.status == 303
            assert answer.headers["cache-control"] == "no-store"
            targets.add(answer.headers["location"])
        assert len(targets) > 1
        for target in targets:
            seed, sample = re.search(r"explore\?seed=(\d)&sample=(\d+)$", target).groups()
            assert seed in "02"
            # Rows of this cache are in another order than its seeds', so the page says damage.
            page = service.ask("GET", f"/caches/partial/explore?seed={seed}&sample={sample}")
            assert b"not recorded yet" not in page.data
        answer = service.ask("GET", "/caches/plain/find?by=random&seed=1")
        assert "explore?seed=1&" in answer.headers["location"]


def test_what_cannot_be_looked_for_is_refused_in_a_sentence(without_images):
    with pytest.raises(ConfigError, match="by='x' is none of random, uncertain"):
        without_images.find("plain", "x", "0", "", "")
    with pytest.raises(ConfigError, match="is not a number from 0"):
        without_images.find("plain", "uncertain", "0", "-1", "")
    with pytest.raises(RowsNotBuiltError, match="nothing of seed 7"):
        without_images.find("plain", "uncertain", "7", "", "")
    with pytest.raises(RowsNotBuiltError, match="nothing of seed 7"):
        without_images.find("plain", "random", "7", "", "")


@pytest.mark.parametrize(
    ("wanted", "label"), [("2", 2), ("cat", 1), ("CAT", 1), ("great", 2), ("at", 0), ("0", 0)]
)
def test_a_class_is_named_by_number_name_or_a_part_of_it(wanted, label):
    assert find_class(wanted, ["bat", "cat", "great white"], 3) == label


@pytest.mark.parametrize("wanted", ["", "3", "9" * 40, "-1", "dog", "\u0663", "<b>"])
def test_a_class_that_does_not_exist_is_refused_with_what_to_write(wanted):
    with pytest.raises(ConfigError, match="is no class of this cache") as refused:
        find_class(wanted, ["bat", "cat", "great white"], 3)
    assert "from 0 to 2" in refused.value.hint
