"""The reference pages say what the code says."""

from __future__ import annotations

import inspect
import re

import pytest
from support.caches import make_spec
from support.pages import ROOT

from cache_service.format.layout import CacheLayout
from distill.methods import METHODS
from docs import codebase, generate


def test_the_generated_parts_are_current():
    stale = [page.relative_to(ROOT).as_posix() for page in generate.stale_pages()]
    assert not stale, f"run `python docs/generate.py`: {stale} are stale"


def test_every_part_is_on_some_page():
    text = "".join(page.read_text() for page in generate.pages())
    assert set(re.findall(r"<!-- generated: (.+?) -->", text)) == set(generate.PARTS)


def test_a_stale_part_is_noticed_and_written_anew():
    page = "before\n<!-- generated: free keys -->\nold\n<!-- end -->\nafter\n"
    found = generate.current(page)
    assert found != page
    assert generate.current(found) == found
    assert found.startswith("before\n<!-- generated: free keys -->\n\n`augment`, ")
    assert found.endswith("\n\n<!-- end -->\nafter\n")


@pytest.mark.parametrize("part", ["build file", "train file", "ops", "methods"])
def test_every_key_has_a_meaning(part):
    rows = re.findall(r"^\| (`\S+`) \|.*\| *(.*?) \|$", generate.PARTS[part](), re.MULTILINE)
    assert rows
    assert [key for key, meaning in rows if not meaning] == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_its_formula_and_its_source(name):
    method = METHODS[name]
    formula = vars(method.settings)["__doc__"]
    assert re.search(r"KL|[Cc]ross-entropy|loss|CE", formula), formula
    assert name == "ce" or "Source:" in inspect.getdoc(method.terms)


@pytest.mark.parametrize("kind", codebase.error_classes(), ids=lambda kind: kind.code)
def test_every_error_has_a_section_with_an_example_and_what_to_do(kind):
    page = (ROOT / "docs" / "errors.md").read_text()
    section = re.search(
        rf"^## {kind.code}\n\n```\n(.*?)\n```\n\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL
    )
    assert section is not None, f"docs/errors.md has no section {kind.code}"
    assert section[1].startswith(f"error[{kind.code}]: ")
    assert len(section[2].split()) > 10


def test_the_readmes_table_of_refusals_has_the_right_exit_codes():
    by_code = {kind.code: kind.exit_code for kind in codebase.error_classes()}
    rows = re.findall(
        r"^\| .+ \| (`\w+`.*?) \| (\d) \|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert len(rows) > 8
    told = {}
    for seen, exit_code in rows:
        for code in re.findall(r"`(\w+)`", seen):
            told[code] = int(exit_code)
    assert told == {code: by_code[code] for code in told}
    assert told.keys() == by_code.keys() - {"storage", "not_a_cache"}


@pytest.mark.parametrize(
    ("label", "codec", "classes"),
    [
        ("`dense`", {"kind": "dense"}, 10),
        ("`int8`", {"kind": "int8"}, 10),
        ("`topk`", {"kind": "topk", "k": 4}, 4),
        ("`topk`, `packed: true`", {"kind": "topk", "k": 4, "packed": True}, 4),
        ("`features`", {"kind": "features", "num_channels": 7}, 7),
        ("`features`, `bits: 8`", {"kind": "features", "num_channels": 7, "bits": 8}, 7),
    ],
)
def test_the_cookbooks_bytes_per_cell_are_what_a_cache_takes(label, codec, classes):
    spec = make_spec(num_classes=10, scales=(1,), codec=codec)
    page = (ROOT / "docs" / "cookbook.md").read_text()
    row = rf"^\| {label} \| (\d+) per [\w ]+?(?: \+ (\d+))? \|"
    per_class, extra = re.search(row, page, re.MULTILINE).groups()
    blocks = 1 if codec.get("packed") else 0  # a byte for every 256 classes
    of_the_view = {"sample", "digest", "origin"}
    stored = sum(a.row_bytes for a in CacheLayout(spec).arrays if a.name not in of_the_view)
    assert stored == int(per_class) * classes + int(extra or 0) + blocks
