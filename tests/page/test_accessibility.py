"""axe-core finds nothing on any page, on a desktop and a phone, in the light and in the dark."""

from __future__ import annotations

import shutil
from typing import NamedTuple

import pytest
from support.browser import DESKTOP, PHONE, Watched
from support.builds import record_toy
from support.damage import damage_rows
from support.page_service import BUSY, LONG, PageService, make_build
from support.serving import TOKENS

from cache_service.api.builds.space import OutOfSpace
from cache_service.api.http.settings import TokenConfig

DATASET = {"name": "support.toys:patches", "args": {"num_samples": 96}}
LONG_NAMES = {"name": "support.toys:patches", "args": {"num_samples": 96, "prefix": LONG}}

LOOKS = [(size, scheme) for size in (DESKTOP, PHONE) for scheme in ("light", "dark")]

FAINT_SVG_TEXT = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (color) => light(color.match(/[\\d.]+/g).map(Number));
  const ground = parse(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll("svg:not(.map) text")].map((e) => {
    const text = parse(getComputedStyle(e).fill);
    return (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
  }).filter((ratio) => ratio < 4.5);
}"""
"""Contrast of text in drawings, which axe does not look at; on maps it has a ground of its own."""


class Site(NamedTuple):
    """A service with something on every page, one without caches, and one with tokens."""

    full: str
    empty: str
    closed: str


@pytest.fixture(scope="module")
def site(root, serve_pages, tmp_path_factory):
    folder, nothing = tmp_path_factory.mktemp("full"), tmp_path_factory.mktemp("empty")
    for name in ("plain", "partial"):
        shutil.copytree(root / name, folder / name)
    shutil.copytree(root / "plain", folder / "hurt")
    damage_rows(folder / "hurt")
    shutil.copytree(root / "plain", folder / "lost")
    document = folder / "lost" / "zarr.json"
    document.write_text(document.read_text().replace("support.toys", "support.toyz"))
    record_toy(str(folder / "long"), scales=[1, 2, 4], seeds="0:1", dataset=LONG_NAMES)
    service = PageService(folder, (DATASET, LONG_NAMES))
    failed = make_build(id="b", state="failed", error="the disk is full.", finished_s=9.0)
    done = make_build(id="c", state="done", cache="plain", started_s=1.0, finished_s=8.0)
    service.builds, service.traffic_figures = [make_build(), failed, done], BUSY
    service.shortage = OutOfSpace(since_s=1.0, detail="no space is left for c/logits/c/0/3.")
    pages, none = service.pages(wait_s=60.0), PageService(nothing).pages()
    tokens = tuple(TokenConfig.model_validate(token) for token in TOKENS)
    with (
        serve_pages(pages) as full,
        serve_pages(none) as empty,
        serve_pages(none, tokens) as closed,
    ):
        yield Site(full, empty, closed)
    for made in (pages, none):
        made.close()


@pytest.mark.parametrize(
    ("served", "path", "heading"),
    [
        ("full", "/", "Caches"),
        ("full", "/caches/plain", "plain"),
        ("full", "/caches/partial", "partial"),
        ("full", "/caches/plain/explore?seed=0&sample=12", "Sample 12 under seed 0"),
        ("full", "/caches/hurt/explore?seed=0&sample=5", "Sample 5 under seed 0"),
        ("full", "/caches/plain/find?by=uncertain&seed=0", "certain"),
        ("full", "/caches/long", "long"),
        ("full", "/caches/long/explore?seed=0&sample=12", "Sample 12 under seed 0"),
        ("full", "/caches/long/find?by=uncertain&seed=0", "certain"),
        ("full", "/caches/lost", "Damage in lost"),
        ("full", "/caches/nope", "Not found"),
        ("empty", "/", "Caches"),
        ("closed", "/", "Sign in"),
    ],
)
def test_axe_finds_nothing(browser, site, served, path, heading):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    ).Axe()
    watched = Watched(browser, getattr(site, served))
    watched.go(path)
    page = watched.page
    assert heading in page.get_by_role("heading", level=1).text_content()
    for viewport, scheme in LOOKS:
        page.set_viewport_size(viewport)
        page.emulate_media(color_scheme=scheme)
        found = axe.run(page)
        assert len(found.response["passes"]) > 10
        assert found.violations_count == 0, (viewport, scheme, found.generate_report())
        assert page.evaluate(FAINT_SVG_TEXT) == [], (viewport, scheme)
        assert watched.overflow() == 0, (viewport, scheme)
    watched.close()
