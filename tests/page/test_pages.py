"""The pages as HTML: well-formed, escaped, and saying what is missing."""

from __future__ import annotations

import asyncio
import re
import shutil

import pytest
import torch
import urllib3
from support.builds import record_toy
from support.html_page import Page
from support.page_service import BUSY, LONG, PageService, make_build, no_images

from cache_service.api.page import routes
from cache_service.api.page.drawing import scale_color
from cache_service.api.page.row_figures import find_row
from cache_service.errors import ConfigError, NotACacheError, RowsNotBuiltError, StorageError
from cache_service.rows.reader import open_cache

EVIL = '"><script>alert(1)</script>'


def parsed(page):
    found = Page()
    found.feed(page.html)
    found.close()
    assert found.open == []
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in found.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        for name in ("href", "src", "action"):
            assert attributes.get(name, "/").startswith(("/", "#", "?", "data:image/png;base64,"))
    return found


def found_in(page, tag):
    return [attributes.get("aria-label") for attributes in parsed(page).all(tag)]


@pytest.fixture
def make():
    """Pages that cannot render images."""
    made = []

    def make(page_service):
        made.append(page_service.pages(renderer=no_images()))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_an_empty_root_says_what_to_type(tmp_path, make):
    html = make(PageService(tmp_path)).overview().html
    assert "There is no cache here yet" in html
    assert "kd-cache build FILE" in html
    assert f"{tmp_path}/NAME" in html


def test_every_cache_is_listed_with_what_identifies_it(pages, root):
    found = parsed(pages.overview())
    links = [attributes.get("href") for attributes in found.all("a")]
    for name in ("mixed", "partial", "plain"):
        assert f"/caches/{name}" in links
        assert f"/caches/{name}/explore" in links
    texts = [text for _, text in found.texts]
    for text in ("2 of 2", "0 of 4", "complete", "17% recorded"):
        assert text in texts
    shown = found_in(pages.cache("partial"), "svg")
    assert "0 of 4 seeds complete, 3 of 16 shards recorded." in shown


def test_a_cache_that_cannot_be_opened_is_listed_with_the_reason(root, tmp_path, make):
    shutil.copytree(root / "partial", tmp_path / "good")
    shutil.copytree(root / "partial", tmp_path / "damaged")
    file = tmp_path / "damaged" / "zarr.json"
    file.write_text(file.read_text().replace('"toy"', '"tow"'))
    html = make(PageService(tmp_path)).overview().html
    assert '<span class="pill bad">damaged</span>' in html
    assert "its seal does not fit its content" in html
    assert "/caches/good" in html
    assert "/caches/damaged" in html


def test_states_of_builds_and_errors_are_shown(root, make):
    assert (
        "does not record caches itself"
        in make(PageService(root, runs_builds=False)).overview().html
    )
    page_service = PageService(root)
    pages = make(page_service)
    assert "No build has been requested yet" in pages.overview().html
    assert "no requests in the last minute" in pages.overview().html
    failed = make_build(state="failed", error=EVIL)
    page_service.builds = [make_build(), failed, make_build(state="queued", rows_total=0)]
    page_service.traffic_figures = BUSY
    found = parsed(pages.overview())
    assert [bar["value"] for bar in found.all("progress")] == ["0.2747", "0.0"]
    texts = [text for _, text in found.texts]
    pace = "5,312 rows/s, 3 min left"
    for text in ("412,000 of 1,500,000", pace, "2.1 ms", "18.4 ms", f"error: {EVIL}", EVIL):
        assert text in texts
    assert len(found.all("script")) == 1


def test_an_event_has_the_same_words_and_the_raw_figures(root, make):
    page_service = PageService(root)
    page_service.builds, page_service.traffic_figures = [make_build()], BUSY
    pages = make(page_service)
    event = pages.event()
    html = pages.overview().html
    for name, text in event["shown"].items():
        assert re.search(rf'id="{name}"[^>]*>{re.escape(text)}<', html), name
    assert event["builds"][0]["rows_per_s"] == 5312.0
    assert event["traffic"]["p99_s"] == BUSY["p99_s"]
    assert event is pages.event()


def test_events_go_on_after_a_moment_in_which_the_queue_cannot_be_read(root, make):
    class Failing(PageService):
        def newest(self, limit):
            raise StorageError("the builds database cannot be used.")

    async def two():
        stopping = asyncio.Event()
        events = routes._events(make(Failing(root)), stopping)
        first = await anext(events)
        stopping.set()
        return [first, *[event async for event in events]]

    assert asyncio.run(two()) == [b": storage\n\n"]


def test_figures_change_the_words_only_and_states_the_structure(root, make):
    def structure(**changes):
        page_service = PageService(root)
        page_service.builds = [make_build(**changes)]
        return make(page_service).event()["structure"]

    assert structure() == structure(rows_done=500_000, eta_s=3.0)
    assert structure() != structure(state="done")


def test_hostile_names_are_shown_as_text(tmp_path, make):
    dataset = {
        "name": "support.toys:patches",
        "args": {"num_samples": 96},
        "split": EVIL.replace("/", ""),
    }
    record_toy(str(tmp_path / "c"), seeds="0:1", dataset=dataset)
    pages = make(PageService(tmp_path))
    for page in (pages.overview(), pages.cache("c"), pages.explore("c", "", "")):
        assert "<script>alert" not in page.html
        assert "&lt;script&gt;alert" in page.html
        parsed(page)
    with pytest.raises(NotACacheError, match="there is no cache") as refused:
        pages.cache(EVIL)
    assert "<script>alert" not in pages.refused(refused.value).html


def test_the_page_of_a_cache_says_everything_that_identifies_it(pages, root):
    found = parsed(pages.cache("plain"))
    texts = " ".join(text for _, text in found.texts)
    spec = PageService(root).service.catalog.open("plain").cache.spec
    for fact in (
        spec.fingerprint,
        spec.teacher.weights_sha256,
        spec.dataset.sha256,
        "pad_crop, horizontal_flip; 16 px",
        "1, 2, 4: 21 cells per view. Scale 4 is stored; the others are computed from it",
        "dense float16",
        "Complete seeds: 0:2.",
    ):
        assert fact in texts
    begun = "Incomplete seeds: seed 0 (2 of 4 shards), seed 2 (1 of 4 shards).<"
    assert begun in pages.cache("partial").html


def test_the_maps_have_a_framed_and_described_cell_for_every_cell_of_the_cache(pages, root):
    found = parsed(pages.explore("plain", "0", "0"))
    frames = [path for path in found.all("path") if path.get("class", "").startswith("cell ")]
    assert len(frames) == len(found.all("title")) - 1 == 21
    assert len(found.all("use")) == 1 + 3
    labels = [svg.get("aria-label", "") for svg in found.all("svg")]
    described = [label for label in labels if label.startswith("Cells of scale 4. row 1 column 1")]
    assert len(described) == 1
    (bar,) = [label for label in labels if label.startswith("Color scale")]
    low, high = re.fullmatch(
        r"Color scale: probability of place0 from (\S+)%, dark, to (\S+)%, bright", bar
    ).groups()
    row = find_row(open_cache(str(root / "plain")), {0: [0, 1, 2]}, 0, 0)
    shown = torch.from_numpy(row.logits_RC).softmax(1)[:, 0] * 100
    assert float(low) == pytest.approx(float(shown.min()), rel=0.06)
    assert float(high) == pytest.approx(float(shown.max()), rel=0.06)


def test_the_colors_span_the_range_that_is_present(pages):
    html = pages.explore("plain", "0", "0").html
    tints = re.findall(r'fill="(#\w{6})" fill-opacity', html)
    assert len(tints) == 21
    assert {scale_color(0), scale_color(1)} <= set(tints)


def test_the_legend_names_every_mark_of_the_maps_and_counts_its_cells(pages, root):
    html = pages.explore("plain", "0", "0").html
    entries = re.findall(
        r'class="key-mark">(\d+)</span><span>(\w+).*?class="soft">(\d+) cells?<', html
    )
    row = find_row(open_cache(str(root / "plain")), {0: [0, 1, 2]}, 0, 0)
    tops = row.logits_RC.argmax(1).tolist()
    counts = {f"place{label}": tops.count(label) for label in set(tops)}
    assert {name: int(cells) for _, name, cells in entries} == counts
    assert [int(mark) for mark, _, _ in entries] == list(range(1, len(counts) + 1))
    names = {mark: name for mark, name, _ in entries}
    marks = re.findall(r'<tspan class="mark">(\d+)</tspan>', html)
    assert [names[mark] for mark in marks] == [f"place{label}" for label in tops]


def test_the_full_name_of_a_class_is_on_hover_in_the_legend_and_in_the_table(tmp_path):
    dataset = {"name": "support.toys:patches", "args": {"num_samples": 96, "prefix": LONG}}
    record_toy(str(tmp_path / "c"), scales=[1, 2, 4], seeds="0:1", dataset=dataset)
    pages = PageService(tmp_path, (dataset,)).pages(wait_s=60.0)
    try:
        html = pages.explore("c", "0", "0").html
    finally:
        pages.close()
    assert len(re.findall(rf"<title>row \d column \d: {LONG}\d ", html)) == 21
    assert len(re.findall(rf"</th><td>{LONG}\d</td>", html)) == 21
    assert re.search(rf'class="key-mark">1</span><span>{LONG}\d', html)


def test_the_explanation_is_about_the_scales_of_the_cache(pages, make, tmp_path):
    assert (
        "at scale 4 from each cell of a 4 x 4 grid. The bold" in pages.explore("plain", "", "").html
    )
    assert "at scale 4" not in pages.explore("mixed", "", "").html
    record_toy(str(tmp_path / "one"), scales=[1], seeds="0:1")
    html = make(PageService(tmp_path)).explore("one", "", "").html
    assert "the prediction from the whole view only" in html
    assert "Color scale" not in html


def test_a_mixed_view_names_its_partner(pages):
    html = pages.explore("mixed", "0", "0").html
    assert "the larger part of a mixed view" in html
    assert re.search(r'href="\?seed=0&amp;sample=\d+">sample \d+</a> \(place\d\); the sample', html)


def test_a_sample_page_links_its_neighbors_and_other_seeds(pages):
    page = pages.explore("plain", "0", "0")
    found = parsed(page)
    keys = {a["data-key"]: a["href"] for a in found.all("a") if "data-key" in a}
    assert keys == {"ArrowRight": "?seed=0&sample=1", "Shift+ArrowRight": "?seed=1&sample=0"}
    assert "?seed=1&sample=0" in [a.get("href") for a in found.all("a")]
    last = {
        a["data-key"] for a in parsed(pages.explore("plain", "1", "95")).all("a") if "data-key" in a
    }
    assert last == {"ArrowLeft", "Shift+ArrowLeft"}


def test_without_its_dataset_the_predictions_are_shown_and_what_to_configure(root, make):
    page = make(PageService(root)).explore("plain", "0", "3")
    parsed(page)
    assert "The server does not open the dataset support.toys:patches (train)" in page.html
    assert "List it under <code>datasets</code> in the serve file" in page.html
    assert "because the label is not known here" in page.html
    stored = ("Views whose pixels the cache stores", "stored in the cache")
    assert any(words in page.html for words in stored)
    assert "complementary" not in page.html
    assert page.html.count("data-cell=") == 21


def test_a_picture_that_fails_leaves_the_predictions_and_the_reason(root, make):
    page = make(PageService(root, ({"name": "support.toys:patches"},))).explore("plain", "0", "3")
    parsed(page)
    assert "The rendering process ended" in page.html
    assert page.html.count("data-cell=") == 21


def test_rows_that_are_not_recorded_are_reported_on_the_page(pages):
    page = pages.explore("plain", "7", "3")
    parsed(page)
    assert page.status == RowsNotBuiltError.http_status
    assert "not recorded yet" in page.html
    assert pages.explore("plain", "0", "96").status == RowsNotBuiltError.http_status


@pytest.mark.parametrize("written", ["-1", "x", "1e3", "9" * 40, "\u0663", "0x1", " 1", EVIL])
def test_what_is_no_number_is_refused(pages, written):
    with pytest.raises(ConfigError, match="is not a number from 0"):
        pages.explore("plain", "0", written)
    with pytest.raises(ConfigError, match="is not a number from 0"):
        pages.explore("plain", written, "0")


def test_pages_carry_the_headers_that_keep_them_alone(server):
    with urllib3.PoolManager(retries=False) as pool:
        for path in ("/", "/caches/plain", "/caches/nope", "/caches/plain/explore?seed=x"):
            answer = pool.request("GET", server + path)
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["referrer-policy"] == "same-origin"
            assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert [pool.request("GET", server + p).status for p in ("/", "/caches/nope")] == [200, 404]
        assert pool.request("GET", f"{server}/caches/plain/explore?seed=x").status == 422


def test_static_files_are_named_ones_with_an_etag(server):
    with urllib3.PoolManager(retries=False) as pool:
        answer = pool.request("GET", f"{server}/static/page.css")
        assert answer.headers["content-type"].startswith("text/css")
        again = pool.request(
            "GET", f"{server}/static/page.css", headers={"If-None-Match": answer.headers["etag"]}
        )
        assert again.status == 304
        for path in ("page.html", "..%2fpages.py", "%2e%2e/pages.py", "base.html", "", "x" * 500):
            assert pool.request("GET", f"{server}/static/{path}", redirect=False).status == 404
