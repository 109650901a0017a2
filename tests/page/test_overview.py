"""The overview is a table that fits the screen; a page of a cache follows its recording."""

from __future__ import annotations

import re
import time

import pytest
from support.browser import DESKTOP, PHONE, Watched
from support.builds import open_toy
from support.caches import make_rows, make_spec, open_writer, write_shard
from support.page_service import BUSY, PageService, make_build, no_images

from cache_service.api.builds.space import OutOfSpace
from cache_service.api.page.formatting import moment
from cache_service.human_format import human_bytes
from cache_service.recording.engines import prepare, run_local
from cache_service.recording.shards import Progress

NOW = 1_790_000_000.0
NUM_CACHES, NUM_BUILDS = 8, 10


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A server of eight caches with one finished build each, one that runs and one that failed."""
    folder = tmp_path_factory.mktemp("many")
    spec = make_spec()
    for number in range(NUM_CACHES):
        writer = open_writer(str(folder / f"cifar100-resnet32x4-{number}"), spec, num_seeds=4)
        for seed in range(number // 2):
            for shard in range(spec.num_shards):
                write_shard(writer, seed, shard)
    service = PageService(folder)
    service.traffic_figures = BUSY
    ended = {"state": "done", "rows_done": 1_500_000, "finished_s": NOW + 3000.0}
    service.builds = [
        make_build(id="a", cache="cifar100-resnet32x4-1", started_s=NOW),
        make_build(id="b", state="failed", started_s=NOW, finished_s=NOW + 60.0, error="x " * 90),
        *(make_build(id=f"c{n}", started_s=NOW, **ended) for n in range(NUM_BUILDS - 2)),
    ]
    return service


@pytest.fixture(scope="module")
def many_pages(many):
    made = many.pages(renderer=no_images())
    yield made
    made.close()


@pytest.fixture(scope="module")
def many_server(many_pages, serve_pages):
    with serve_pages(many_pages) as base:
        yield base


@pytest.mark.parametrize(
    ("viewport", "screens"), [(DESKTOP, 1), (PHONE, 2)], ids=["desktop", "phone"]
)
def test_eight_caches_and_ten_builds_fit(browser, many_server, viewport, screens):
    watched = Watched(browser, many_server, viewport=viewport)
    watched.go("/")
    for table, rows in (("caches", NUM_CACHES), ("builds", NUM_BUILDS)):
        assert watched.page.locator(f"table.{table} tbody tr").count() == rows
    last = watched.page.locator("table.builds tbody tr").last.bounding_box()
    assert last["y"] + last["height"] <= screens * viewport["height"]
    assert watched.overflow() == 0
    assert watched.problems == []
    watched.close()


def rows_of(html, table):
    (body,) = re.findall(rf'<table class="list {table}".*?</table>', html, re.DOTALL)
    return re.findall(r'<tr role="row"[^>]*>(<th role="rowheader".*?)</tr>', body, re.DOTALL)


def test_every_cache_is_a_row_with_its_figures_and_when_it_changed(many_pages):
    rows = rows_of(many_pages.overview().html, "caches")
    assert len(rows) == NUM_CACHES
    seed_bytes = sum(array.nbytes for array in make_rows(make_spec(), 0).values())
    for number, row in enumerate(rows):
        for part in (
            f'href="/caches/cifar100-resnet32x4-{number}"',
            'class="teacher">toy<',
            'class="dataset">toy <',
            f">{number // 2} of 4<",
            f'class="size">{human_bytes(number // 2 * seed_bytes)}<',
            "<time datetime=",
        ):
            assert part in row, (number, part)
    states = [re.findall(r'<span class="pill[^>]*>([^<]*)<', row) for row in rows]
    some, half, most = ["25% recorded"], ["50% recorded"], ["75% recorded"]
    assert states == [["empty"], ["recording, 0%"], some, some, half, half, most, most]


def test_every_finished_build_is_a_line_with_start_duration_link_and_error(many_pages):
    rows = rows_of(many_pages.overview().html, "builds")
    assert len(rows) == NUM_BUILDS
    for row in rows:
        assert 'href="/caches/' in row
        assert '<time datetime="2026-09-21T' in row
    assert ">50 min<" in rows[-1]
    assert ">1,500,000<" in rows[-1]
    assert ">1 min<" in rows[1]
    assert "<summary>error: x x" in rows[1]


def test_builds_that_run_come_first_however_old_they_are(many, many_pages):
    before = many.builds
    many.builds = [*before[2:], before[0]]
    try:
        rows = rows_of(many_pages.overview().html, "builds")
    finally:
        many.builds = before
    assert 'id="build-1-pace">5,312 rows/s, 3 min left<' in rows[0]


def test_times_are_utc_and_in_the_visitors_zone_with_the_script(browser, many_server):
    for script, text in ((False, "21 Sep 14:13 UTC"), (True, r"21 Sept?, 23:13")):
        watched = Watched(
            browser, many_server, java_script_enabled=script, timezone_id="Asia/Tokyo"
        )
        watched.go("/")
        shown = watched.page.locator("table.builds time").first.text_content()
        assert re.fullmatch(text, shown)
        watched.close()


def test_the_year_is_named_when_it_is_another_one():
    assert ">21 Sep 14:13 UTC<" in moment(NOW, now_s=NOW + 1)
    assert ">21 Sep 2026 14:13 UTC<" in moment(NOW, now_s=NOW + 1e8)
    assert moment(None) == "\N{EN DASH}"


def test_the_page_of_a_cache_follows_its_recording(browser, tmp_path, serve_pages):
    spec = make_spec()
    writer = open_writer(str(tmp_path / "growing"), spec, num_seeds=2)
    write_shard(writer, 0, 0)
    service = PageService(tmp_path)
    pages = service.pages(renderer=no_images())
    with serve_pages(pages) as base:
        watched = Watched(browser, base)
        watched.go("/caches/growing")
        page = watched.page
        page.evaluate("window.unloaded = false")
        page.locator("#live.on").wait_for()
        assert page.get_by_text("32 of 200 planned views are recorded, 16%").count() == 1
        write_shard(writer, 0, 1)  # by another process, without any build of this server
        page.get_by_text("64 of 200 planned views are recorded, 32%").wait_for(timeout=20_000)
        page.get_by_text("0 of 2 seeds complete, 2 of 8 shards recorded").wait_for()
        service.builds = [make_build(cache="growing"), make_build(id="other", cache="other")]
        page.get_by_role("row", name="growing").wait_for(timeout=20_000)
        assert page.get_by_role("row", name="other").count() == 0
        service.builds = [make_build(cache="growing", rows_done=600_000)]
        page.get_by_text("600,000 of 1,500,000").wait_for(timeout=20_000)
        assert page.evaluate("window.unloaded") is False
        assert watched.problems == []
        watched.close()
    pages.close()


def test_progress_counts_rows_and_not_whole_shards(tmp_path):
    build = open_toy(str(tmp_path / "c"), layout__shard_rows=96, layout__chunk_rows=96)
    prepare(build)
    heard: list[Progress] = []
    run_local(build, seeds=(0, 1), on_progress=heard.append)
    answered = [each.rows_answered for each in heard]
    assert answered == sorted(answered)
    assert {16, 32, 48, 64, 80, 96, 112, 192} <= set(answered)
    assert {each.rows_done for each in heard} == {0, 96, 192}
    halfway = next(each for each in heard if each.rows_answered == 96 and not each.rows_done)
    assert halfway.eta_s == pytest.approx(96 / halfway.rows_per_s)


def test_a_resumed_build_begins_with_the_rows_of_earlier_runs(tmp_path):
    build = open_toy(str(tmp_path / "c"))
    prepare(build)
    run_local(build, seeds=(0,))
    heard: list[Progress] = []
    run_local(build, seeds=(0, 1), on_progress=heard.append)
    assert heard[0].rows_answered == 96 + 16
    assert heard[-1].rows_answered == heard[-1].rows_total == 192


def test_the_page_shows_the_answered_rows_of_a_running_build(many, many_pages):
    before = many.builds
    many.builds = [make_build(rows_done=0, rows_answered=750_000, started_s=time.time())]
    try:
        html = many_pages.overview().html
    finally:
        many.builds = before
    assert ">750,000 of 1,500,000<" in html
    assert 'value="0.5"' in html


def test_a_full_disk_is_told_with_its_start_and_goes_away_without_a_reload(
    browser, many, many_server
):
    many.shortage = OutOfSpace(since_s=NOW, detail="no space is left for c/logits/c/0/3.")
    watched = Watched(browser, many_server)
    try:
        watched.go("/")
        page = watched.page
        alert = page.get_by_role("alert")
        for text in ("The disk is full", "no build can go on since 21 Sep", "c/logits/c/0/3"):
            assert text in alert.text_content()
        page.locator("#live.on").wait_for()
        many.shortage = None
        alert.wait_for(state="detached", timeout=20_000)
        watched.go("/caches/cifar100-resnet32x4-1")
        assert page.get_by_role("alert").count() == 0
        many.shortage = OutOfSpace(since_s=NOW, detail="no space is left.")
        page.get_by_role("alert").wait_for(timeout=20_000)
        assert watched.problems == []
    finally:
        many.shortage = None
        watched.close()
