"""The report: well-formed, self-contained, and saying what was measured."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from support.html_page import Page

from cli.experiments.demo.report import COLUMNS, cells, render_report


@pytest.fixture(scope="module")
def html(demo):
    return render_report(demo.result)


@pytest.fixture(scope="module")
def page(html):
    found = Page()
    found.feed(html)
    found.close()
    assert found.open == []
    return found


def test_the_table_holds_every_number_that_was_measured(demo, page):
    assert page.text_of("th")[: len(COLUMNS)] == list(COLUMNS)
    assert page.text_of("th")[len(COLUMNS) :] == [row[0] for row in cells(demo.result)]
    assert page.text_of("td") == [text for row in cells(demo.result) for text in row[1:]]


def test_the_terminals_numbers_are_the_measured_ones(demo):
    measured = demo.result.rows[1].measured
    _, accuracy, step, memory = cells(demo.result)[1]
    assert accuracy == f"{measured.accuracy * 100:.1f}%"
    assert float(step.removesuffix(" ms")) == pytest.approx(measured.seconds_per_step * 1000, 0.1)
    assert memory.endswith("B")


def test_nothing_is_fetched_and_nothing_runs(html, page):
    names = {tag for tag, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "form"}
    assert "http:" not in html
    assert "https:" not in html
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
        assert attributes.get("href", "#").startswith("#")


def test_the_policy_names_the_digest_of_the_one_style_sheet(html, page):
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = page.all("meta")[1]
    assert policy["http-equiv"] == "Content-Security-Policy"
    assert "default-src 'none'" in policy["content"]
    assert f"style-src 'sha256-{digest}'" in policy["content"]
    assert "prefers-color-scheme: dark" in style


def test_every_drawing_has_words_or_is_hidden_from_those_who_listen(page):
    drawings = page.all("svg")
    assert len(drawings) >= 8
    for attributes in drawings:
        spoken = attributes.get("role") == "img" and attributes.get("aria-label")
        assert spoken or attributes.get("aria-hidden") == "true"


def test_headings_descend_and_sections_are_named_by_them(page):
    levels = [tag for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels == ["h1"] + ["h2"] * 8
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {section["aria-labelledby"] for section in page.all("section")} <= set(ids)
    for used in page.all("use"):
        assert used["href"].removeprefix("#") in ids


def test_the_cells_are_described_in_words_with_their_kind(demo, page):
    said = [svg.get("aria-label", "") for svg in page.all("svg")]
    (quarters,) = [text for text in said if text.startswith("Cells of scale 2")]
    marked = demo.result.sample.grids[1].complementary
    assert quarters.count("complementary") == sum(marked)
    assert quarters.count("consistent") == len(marked) - sum(marked)


def test_commands_and_files_are_there_as_they_are(demo, page):
    blocks = "\n".join(page.text_of("pre"))
    assert f"kd-cache build {Path(demo.out) / 'build.yaml'}" in blocks
    for text in demo.result.files.values():
        assert text.strip() in blocks


def test_losses_that_disagree_are_not_called_equal(demo):
    found = demo.result.agreement
    wrong = found._replace(cached=tuple(loss + 0.01 for loss in found.cached))
    assert "NOT within" in render_report(replace(demo.result, agreement=wrong))
    assert "NOT within" not in render_report(demo.result)
