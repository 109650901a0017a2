"""`kd-cache bench` in its quick form: every benchmark works; never how fast it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from support.command import kd_cache
from support.photos import write_photos
from support.s3 import moto_environment, new_prefix

from cache_service.storage import open_storage
from cli.experiments.bench import pairs, step, stream
from cli.experiments.bench.formats import FORMATS, Format, Opened
from cli.experiments.bench.page import BenchOptions, Goal
from cli.experiments.bench.pairs import TINY, find_pairs, noise
from cli.experiments.bench.total import Seconds, figure_of

VARIANTS = [
    "labels alone",
    "cache, KD",
    "live teacher, KD",
    "cache, SD-KD",
    "live teacher, SD-KD",
]

TINY_STREAM = stream.Sizes(
    row_sizes=(stream.RowSize(10, 512, 32, 16), stream.RowSize(1000, 64, 32, 16)),
    rounds=1,
    turn_s=0.001,
)


def bench(name, tmp_path, *options):
    ended = kd_cache("bench", name, "--quick", "--json", "--out", str(tmp_path), *options)
    assert ended.code == 0, ended.err
    document = json.loads(ended.out)
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert kept["figures"] == document["figures"]
    assert document["machine"]["cores"] >= 1
    assert "torch" in document["versions"]
    page = (tmp_path / f"{name}.md").read_text()
    assert f"kd-cache bench {name}" in page
    return document["figures"], page


def test_a_step_is_timed_in_every_variant_against_labels_alone(tmp_path):
    figures, page = bench("step", tmp_path)
    assert [each["variant"] for each in figures] == VARIANTS
    assert figures[0]["ratios"] == [1.0] * step.QUICK.rounds
    for each in figures:
        assert each["views_per_s"] > 0
        assert len(each["seconds_per_step"]) == step.QUICK.rounds
    assert page.count("| resnet8x4 -> resnet8x4 | ") == len(VARIANTS)
    assert page.count("time of a step / labels alone") == 2


def test_a_recording_is_compared_with_its_slowest_part(tmp_path):
    [figure], _ = bench("build", tmp_path)
    rates = figure["rows_per_s"]
    assert set(rates) == {"teacher", "views", "disk"}
    assert rates[figure["slowest"]] == min(rates.values()) > 0
    assert figure["of_slowest"] == pytest.approx(figure["recorded_per_s"] / min(rates.values()))
    assert figure["cells"] == 5


def test_a_total_compares_numbers_of_students(tmp_path):
    figures, _ = bench("total", tmp_path)
    assert [each["students"] for each in figures] == [1, 2, 4, 8]
    assert all(value > 0 for each in figures for value in each["seconds_a_view"].values())


def test_a_view_is_compared_with_torchvisions_and_with_several_of_one_decode(tmp_path):
    photos = write_photos(tmp_path / "photos", count=6)
    figures, page = bench("views", tmp_path, "--images", str(photos))
    assert [each["images"] for each in figures] == [
        *["32 px, in memory"] * 5,
        *["32 px, PNG files"] * 5,
        *["18 JPEG files"] * 7,
    ]
    by_name = {(each["images"], each["variant"]): each for each in figures}
    for each in figures:
        beside = by_name[each["images"], each["beside"]]
        [own], [other] = each["cpu_seconds_a_view"], beside["cpu_seconds_a_view"]
        assert own > 0
        assert each["ratios"] == [own / other]
    assert by_name["18 JPEG files", "step on a recording, repeats: 4"]["beside"] == (
        "step on labels alone"
    )
    assert sum("| training, repeats: 4 |" in line for line in page.splitlines()) == 3


def test_rows_of_every_size_are_read_in_every_format_beside_their_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "QUICK", TINY_STREAM)
    for name, value in moto_environment().items():
        monkeypatch.setenv(name, value)
    url = new_prefix()
    figures, page = bench("stream", tmp_path, "--s3", url)
    local = [each for each in figures if each["where"] == "local files"]
    assert {each["format"] for each in local} == {each.name for each in FORMATS}
    assert {each["state"] for each in local} == {"warm", "reopened", "cold"}
    assert {each["row_bytes"] for each in figures} == {40, 2020}
    kinds = ("row_bytes", "where", "state", "order")
    floors = {tuple(each[k] for k in kinds): each for each in figures if each["is_floor"]}
    assert len(floors) == 2 * (3 * 2 + 2 + 2)
    for each in figures:
        floor = floors[tuple(each[k] for k in kinds)]
        [own], [other] = each["rows_per_s"], floor["rows_per_s"]
        assert own > 0
        assert each["of_floor"] == [pytest.approx(own / other)]
    assert page.count("| S3 | at random | kd-cache, logits |") == 2
    assert open_storage(url).list("") == []


def test_a_format_that_returns_other_rows_is_refused(tmp_path, monkeypatch):
    wrong = Format("wrong", FORMATS[0].write, lambda *_: Opened(lambda a, b: np.zeros(b - a), None))
    monkeypatch.setattr(stream, "FORMATS", (*FORMATS[:1], wrong))
    monkeypatch.setattr(stream, "QUICK", TINY_STREAM)
    ended = kd_cache("bench", "stream", "--quick")
    assert ended.code == 3
    assert "wrong returned other rows" in ended.err


@pytest.mark.parametrize(
    ("seconds", "students", "ratio", "passes"),
    [
        (Seconds(record=1.0, cached=2.0, live=3.0), 1, 1.0, 1),
        (Seconds(record=2.5, cached=2.0, live=3.0), 1, 1.5, 3),
        (Seconds(record=2.5, cached=2.0, live=3.0), 2, 6.5 / 6, 2),
        (Seconds(record=1.0, cached=3.0, live=2.0), 8, 25 / 16, None),
    ],
)
def test_passes_are_counted_until_the_recording_is_cheaper(seconds, students, ratio, passes):
    figure = figure_of(TINY, seconds, students)
    assert figure["recorded_over_live"] == pytest.approx(ratio)
    assert figure["passes_to_break_even"] == passes


@pytest.mark.faults
@pytest.mark.timeout(300)
def test_memory_is_measured_in_processes_of_their_own(tmp_path):
    figures, _ = bench("memory", tmp_path)
    assert [each["variant"] for each in figures] == VARIANTS
    assert figures[0]["of_labels_alone"] == 1.0
    assert all(each["peak_bytes"] > 2**20 for each in figures)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["step", "--pair", "resnet50:resnet19"], "resnet50:resnet18"),
        (["steps"], "step, memory, build, total, stream, views, codec, http"),
        (["step", "--device", "cuda:7"], "cuda:7"),
    ],
)
def test_what_is_not_known_is_refused_by_name(arguments, named):
    ended = kd_cache("bench", *arguments)
    assert ended.code == 2
    assert named in ended.err


def test_the_default_pairs_are_those_that_the_machine_can_train():
    def names(**given):
        return [pair.name for pair in find_pairs((), **given)]

    assert names(quick=True, on_gpu=True) == [TINY.name]
    assert names(quick=False, on_gpu=False) == ["resnet32x4:resnet8x4"]
    assert len(names(quick=False, on_gpu=True)) == 3


def test_the_images_of_a_benchmark_are_the_same_in_every_process_and_large_ones_are_jpegs():
    small, large = (noise(num_samples=20, size=size, num_classes=3) for size in (32, 224))
    assert small[4][0].tobytes() == noise(num_samples=9, size=32, num_classes=3)[4][0].tobytes()
    image, label = large[7]
    assert (image.format, image.size, label) == ("JPEG", pairs.JPEG_SIDES, 7 % 3)


@pytest.mark.parametrize(
    ("measured", "at_least", "result"),
    [
        (1.0504, False, "met"),
        (1.06, False, "missed by 0.010"),
        (1.0496, True, "met"),
        (1.04, True, "missed by 0.010"),
    ],
)
def test_a_goal_is_met_or_missed_by_what_is_printed(measured, at_least, result):
    goal = Goal("a / b", 1.05, measured, at_least)
    assert goal.row[-1] == result
    assert goal.is_met == (result == "met")


def test_a_page_names_the_number_types_of_its_networks():
    types = {
        device: BenchOptions((), device, quick=True, on_message=print).arithmetic
        for device in ("cpu", "cuda")
    }
    assert "float32" in types["cpu"]
    assert "bfloat16" in types["cuda"]
