"""The pages in a real browser: live, by keyboard, without a script."""

from __future__ import annotations

import re

import pytest
from support.browser import Watched
from support.page_service import BUSY, QUIET, make_build

from cache_service.api.page.rendering import static_file
from cache_service.rows.reader import open_cache

SAMPLE = "/caches/plain/explore?seed=0&sample=12"


@pytest.fixture
def visit(browser, server):
    """A page that must behave: everything it said is checked when it is left."""
    opened = []

    def visit(path, **options):
        watched = Watched(browser, server, **options)
        opened.append(watched)
        watched.go(path)
        return watched

    yield visit
    for watched in opened:
        problems = [each for each in watched.problems if "404" not in each]
        watched.close()
        assert problems == []


@pytest.fixture
def busy(page_service):
    failed = make_build(id="b", state="failed", cache="wrn", error="the disk is full.")
    page_service.builds, page_service.traffic_figures = [make_build(), failed], BUSY
    yield page_service
    page_service.builds, page_service.traffic_figures = [], QUIET


def test_figures_move_while_the_page_is_open(visit, busy):
    page = visit("/").page
    page.locator("#live.on").wait_for()
    assert page.locator("#build-1-rows").text_content() == "412,000 of 1,500,000"
    busy.builds = [make_build(rows_done=600_000, eta_s=7.0), *busy.builds[1:]]
    page.get_by_text("600,000 of 1,500,000").wait_for(timeout=15_000)
    assert page.locator("#build-1-pace").text_content() == "5,312 rows/s, 7.0 s left"
    assert float(page.locator("#build-1-bar").evaluate("bar => bar.value")) == 0.4


def test_a_build_that_comes_or_fails_appears_without_a_reload(visit, busy):
    page = visit("/").page
    page.evaluate("window.unloaded = false")
    busy.builds = [
        make_build(id="new", cache="just-asked", state="queued", rows_done=0),
        *busy.builds,
    ]
    page.get_by_role("row", name="just-asked").wait_for(timeout=15_000)
    assert page.locator("#build-1-state").text_content() == "queued"
    assert page.evaluate("window.unloaded") is False


def test_without_scripts_the_page_is_whole(visit, busy):
    page = visit("/", java_script_enabled=False).page
    assert page.locator("#build-1-rows").text_content() == "412,000 of 1,500,000"
    assert page.get_by_text("error: the disk is full.").is_visible()
    assert not page.locator("#live").is_visible()
    sample = visit(SAMPLE, java_script_enabled=False).page
    sample.get_by_label("Sample", exact=True).fill("20")
    sample.get_by_label("Seed", exact=True).fill("1")
    sample.get_by_role("button", name="Show").click()
    assert sample.get_by_role("heading", level=1).text_content() == "Sample 20 under seed 1"


def test_words_on_a_map_are_readable_over_any_color():
    text = static_file("page.css").content.decode()
    chip = re.search(r"\.chip \{ fill: (#\w{6}); fill-opacity: (\.\d+); \}", text)
    words = re.search(r"svg text\.onchip \{ fill: (#\w{6})", text)
    worst = [
        int(byte * float(chip[2]) + 255 * (1 - float(chip[2])))
        for byte in bytes.fromhex(chip[1][1:])
    ]

    def light(rgb):
        linear = [v / 255 / 12.92 if v < 11 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert (light(bytes.fromhex(words[1][1:])) + 0.05) / (light(worst) + 0.05) >= 4.5


def test_everything_is_reached_by_tab_and_seen_where_it_is(visit):
    page = visit(SAMPLE).page
    wanted = page.evaluate(
        "document.querySelectorAll('a[href], button, input:not([type=hidden]), summary').length"
    )
    reached = []
    for _ in range(wanted + 5):
        page.keyboard.press("Tab")
        values = page.evaluate(
            "() => { const e = document.activeElement; if (e === document.body) return null;"
            " const s = getComputedStyle(e); return [e.textContent.trim() || e.ariaLabel || e.name,"
            " s.outlineStyle, parseFloat(s.outlineWidth)]; }"
        )
        if values is None:
            break
        reached.append(values)
    assert reached[0][0] == "Skip to the content"
    assert len(reached) == wanted
    assert all(style != "none" and width >= 1 for _, style, width in reached)


def test_arrows_walk_through_samples_and_seeds_but_not_in_a_field(visit):
    page = visit(SAMPLE).page
    page.keyboard.press("ArrowRight")
    page.wait_for_url("**seed=0&sample=13")
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_url("**seed=1&sample=13")
    page.get_by_label("Sample", exact=True).focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(100)
    assert page.url.endswith("seed=1&sample=13")


def test_the_pictures_are_the_pixels_and_lie_under_the_maps(visit, root):
    page = visit(SAMPLE).page
    sizes = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.complete])")
    assert sizes == [[16, True]] * 2  # the original and one other seed
    assert page.locator("svg.map").count() == 1 + 3
    assert page.locator("svg.map use").count() == 1 + 3
    row = page.locator("tr.label")
    assert row.locator("th .classname").text_content() == "place2"
    assert page.get_by_text("equal", exact=True).is_visible()
    assert open_cache(str(root / "plain")).spec.num_cells == page.locator("tr[data-cell]").count()


def test_the_policy_blocks_what_the_page_does_not_bring(browser, server):
    watched = Watched(browser, server)
    watched.go("/")
    watched.page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.evil = 1';"
        " document.body.append(s); }"
    )
    assert watched.page.evaluate("window.evil") is None
    assert any("Content Security Policy" in each for each in watched.problems)
    watched.close()


def test_landmarks_labels_and_headers_are_there(visit, busy):
    for path in ("/", SAMPLE):
        page = visit(path).page
        for role in ("banner", "main"):
            assert page.get_by_role(role).count() == 1
        assert page.get_by_role("heading", level=1).count() == 1
        values = page.evaluate(
            "() => [...document.querySelectorAll('input:not([type=hidden]), progress, nav, table')]"
            ".filter(e => !(e.labels?.length || e.ariaLabel || e.querySelector('caption')))"
            ".map(e => e.outerHTML)"
        )
        assert values == []
        assert page.locator("th:not([scope])").count() == 0
