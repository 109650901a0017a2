"""No link leads nowhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest
from support.pages import ROOT, anchors, links, pages

IDS = [page.relative_to(ROOT).as_posix() for page in pages()]


@pytest.mark.parametrize("page", pages(), ids=IDS)
def test_every_link_to_a_file_or_a_heading_leads_there(page):
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT), f"{page.name}: {target} leaves the repository"
        if fragment:
            assert fragment in anchors(file), f"{page.name}: {target}"


def test_every_page_is_reached_from_the_readme():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in seen:
            continue
        seen.add(page)
        targets = [(page.parent / target.partition("#")[0]).resolve() for target in links(page)]
        left += [target for target in targets if target.suffix == ".md"]
    assert set(pages()) <= seen


def test_decisions_are_numbered_without_gaps():
    names = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    assert [int(name[:3]) for name in names] == list(range(1, len(names) + 1))


@pytest.mark.parametrize("page", pages(), ids=IDS)
def test_a_page_is_plain_and_names_no_other_workplace(page):
    text = page.read_text()
    assert text.isascii()
    assert not re.search(r"/work/|/tmp/|\.\./shared", text)


def test_the_picture_has_words_for_those_who_do_not_see_it():
    root = ET.parse(ROOT / "docs" / "flow.svg").getroot()
    space = {"svg": "http://www.w3.org/2000/svg"}
    assert root.find("svg:title", space).text
    assert len(root.find("svg:desc", space).text.split()) > 30
    assert "prefers-color-scheme: dark" in root.find("svg:style", space).text
    assert re.search(r"!\[[^\]]{60,}\]\(docs/flow\.svg\)", (ROOT / "README.md").read_text())
