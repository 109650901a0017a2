"""The tables of costs and goals say what the committed JSON documents say."""

from __future__ import annotations

import json
import shutil

import pytest

from docs import figures
from docs.figures import RESULTS


def test_a_page_beside_its_figures_is_the_page_of_these_figures():
    runs = list(figures.measured())
    assert {"step", "memory", "build", "total", "views"} <= {each.page.name for each in runs}
    for each in runs:
        table = (RESULTS.parent / each.link).read_text()
        for row in each.page.rows:
            assert f"| {' | '.join(row)} |" in table, each.link


def test_a_result_that_changes_changes_the_tables(tmp_path, monkeypatch):
    shutil.copytree(RESULTS, tmp_path / "results")
    path = tmp_path / "results" / "gpu" / "step.json"
    document = json.loads(path.read_text())
    [kd] = (
        each
        for each in document["figures"]
        if each["pair"].startswith("vit") and each["variant"] == "cache, KD"
    )
    kd["ratios"] = [7.25]
    path.write_text(json.dumps(document))
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    assert "| 7.25 (live 3.13) |" in figures.costs()
    assert "| at most 1.02 | 7.250 | missed by 6.230 |" in figures.goals()


def test_a_machine_without_a_benchmark_has_an_empty_cell(tmp_path, monkeypatch):
    shutil.copytree(RESULTS, tmp_path / "results")
    (tmp_path / "results" / "cpu" / "views.json").rename(tmp_path / "results" / "views.json")
    (tmp_path / "results" / "cpu" / "step.json").write_text(
        (RESULTS / "gpu" / "step.json").read_text()
    )
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results")
    assert "torchvision" not in figures.costs()
    assert "224 px | 1.02 (live 3.13) | 1.02 (live 3.13) |" in figures.costs()


@pytest.mark.parametrize("folder", figures.MACHINES)
def test_no_page_of_a_quick_run_is_kept(folder):
    for path in (RESULTS / folder).glob("*.json"):
        assert json.loads(path.read_text())["quick"] is False, path
