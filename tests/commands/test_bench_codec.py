"""`kd-cache bench codec`: the figures are those of the methods, and what it cannot compare with."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.caches import make_spec, write_cache
from support.command import kd_cache

from cli.experiments.bench.codec import codec_page, log_softmax, measure_codec
from cli.experiments.bench.page import BenchOptions


def options(**changed) -> BenchOptions:
    return BenchOptions((), "cpu", True, lambda _: None, **changed)


@pytest.fixture(scope="module")
def figures():
    (found,) = measure_codec(options())
    return {each["method"]: each for each in found}


def test_the_quick_form_writes_a_page_a_plot_and_figures_of_every_family(tmp_path):
    ended = kd_cache("bench", "codec", "--quick", "--json", "--out", str(tmp_path))
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)["figures"]
    page = (tmp_path / "codec.md").read_text()
    assert "![Bytes of a row, and what they lose](codec.svg)" in page
    for each in found:
        assert f"| {each['method']} | " in page
    families = ("dense", "int8", "topk", "features", "uniform", "renormalised", "polynomial")
    for family in (*families, "sampled", "low rank", "transform code"):
        assert any(each["method"].startswith(family) for each in found), family
    assert (tmp_path / "codec.svg").read_text().startswith("<svg xmlns=")


def test_more_classes_and_more_bits_lose_less_at_every_temperature(figures):
    for better, worse in [
        ("dense float16", "int8"),
        ("features 60", "features 60 in 8 bits"),
        ("topk 24", "topk 10"),
        ("topk 24 packed", "topk 10 packed"),
        ("uniform tail 24", "uniform tail 10"),
        ("transform code 92 B", "transform code 48 B"),
    ]:
        for temperature in (1, 2, 4, 8):
            assert figures[better][f"kl_{temperature}"] < figures[worse][f"kl_{temperature}"]


def test_a_distribution_without_some_classes_is_infinitely_far_and_never_the_best(figures):
    assert figures["renormalised top 10"]["kl_1"] is None
    assert np.isfinite(figures["renormalised top 10"]["gradient_1"])


def test_a_goal_names_the_method_that_own_codecs_of_no_more_bytes_are_behind_the_most():
    losses = [("topk 4", "kd-cache", 30, 0.4), ("topk 9", "kd-cache", 60, 0.1)]
    losses += [("too small", "x", 20, 0.01), ("far", "x", 50, 0.1), ("near", "x", 70, 0.2)]
    figures = [
        {
            "method": name,
            "source": source,
            "row_bytes": size,
            "encoded_per_s": None,
            **{f"kl_{t}": kl for t in (1, 2, 4, 8)},
            "gradient_1": 0.1,
            "gradient_4": 0.1,
            "answers": "a",
            "views": 1,
            "classes": 10,
        }
        for name, source, size, kl in losses
    ]
    goals = codec_page(figures, options()).goals
    assert [goal.measured for goal in goals] == [pytest.approx(4.0)] * 4
    assert all(goal.what.endswith("/ far (50 B)") and not goal.is_met for goal in goals)


def test_bytes_are_those_of_the_stored_arrays(figures):
    sizes = {name: each["row_bytes"] for name, each in figures.items()}
    assert (sizes["dense float16"], sizes["int8"]) == (2 * 120, 120 + 8)
    assert (sizes["topk 10"], sizes["topk 10 packed"]) == (4 * 10 + 16, 2 * 10 + 12 + 1)
    assert (sizes["features 60"], sizes["features 60 in 8 bits"]) == (2 * 60, 60 + 8)
    assert sizes["uniform tail 10"] == 40


def test_log_probabilities_sum_to_one_at_every_temperature():
    scores = np.array([[1.0, -np.inf, 800.0], [0.0, 0.0, 0.0]])
    for temperature in (0.5, 1, 8):
        assert np.exp(log_softmax(scores, temperature)).sum(-1) == pytest.approx(1)


def test_a_recorded_cache_is_encoded_in_every_way(tmp_path):
    spec = make_spec(num_samples=40, num_classes=20, scales=(1,), codec={"kind": "dense"})
    write_cache(str(tmp_path / "cache"), spec, range(2))
    (found,) = measure_codec(options(cache=str(tmp_path / "cache")))
    assert {each["views"] for each in found} == {2 * 20}
    assert {each["classes"] for each in found} == {20}
    assert "2 seeds" in found[0]["answers"]


@pytest.mark.parametrize(
    ("codec", "seeds", "code", "message"),
    [
        ({"kind": "topk", "k": 4}, 2, 2, "needs answers to compare with, but"),
        ({"kind": "int8"}, 2, 2, "holds int8"),
        ({"kind": "dense"}, 1, 2, "needs two complete seeds, but"),
    ],
)
def test_a_cache_without_the_answers_is_refused(tmp_path, codec, seeds, code, message):
    write_cache(str(tmp_path / "cache"), make_spec(codec=codec), range(seeds))
    ended = kd_cache("bench", "codec", "--cache", str(tmp_path / "cache"))
    assert ended.code == code
    assert message in ended.err


def test_without_a_cache_only_the_quick_form_runs():
    ended = kd_cache("bench", "codec")
    assert ended.code == 2
    assert "kd-cache bench codec --cache CACHE" in ended.err
