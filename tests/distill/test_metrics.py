"""Metrics files: each step once, whatever happened on the way."""

from __future__ import annotations

import csv
import io
import json

import pytest

from cli.train_commands import show_progress
from distill.reporting import Event, metrics_files, read_metrics


def write(out, events, *, step=0):
    with metrics_files(str(out), step=step) as record:
        for event in events:
            record(event)


def steps(numbers, epoch=0):
    return [Event("step", epoch, number, {"loss": number / 10}) for number in numbers]


def test_lines_are_the_events_in_order(tmp_path):
    write(tmp_path, [Event("start", 0, 0, {"model": "m"}), *steps([1, 2])])
    assert read_metrics(str(tmp_path)) == [
        {"kind": "start", "epoch": 0, "step": 0, "model": "m"},
        {"kind": "step", "epoch": 0, "step": 1, "loss": 0.1},
        {"kind": "step", "epoch": 0, "step": 2, "loss": 0.2},
    ]


def test_checkpoints_and_the_end_are_not_metrics(tmp_path):
    write(tmp_path, [Event("checkpoint", 0, 1, {}), Event("end", 1, 1, {})])
    assert read_metrics(str(tmp_path)) == []


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, steps([1, 2, 3, 4]))
    write(tmp_path, steps([3, 4, 5]), step=2)
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2, 3, 4, 5]


def test_a_fresh_run_drops_everything(tmp_path):
    write(tmp_path, steps([1, 2, 3]))
    write(tmp_path, steps([1]))
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    write(tmp_path, steps([1, 2]))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "step", "epo')
    write(tmp_path, steps([3]), step=2)
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2, 3]


def table(out):
    return list(csv.DictReader(io.StringIO((out / "metrics.csv").read_text())))


def test_the_table_has_a_row_per_epoch_with_every_column(tmp_path):
    write(
        tmp_path,
        [
            Event("epoch", 1, 5, {"loss": 2.5, "eval_top1": None}),
            Event("epoch", 2, 10, {"loss": 2.0, "eval_top1": 0.5, "extra": 1}),
        ],
    )
    assert table(tmp_path) == [
        {"epoch": "1", "step": "5", "loss": "2.5", "eval_top1": "", "extra": ""},
        {"epoch": "2", "step": "10", "loss": "2.0", "eval_top1": "0.5", "extra": "1"},
    ]


def test_the_table_of_a_resumed_run_keeps_the_epochs_before(tmp_path):
    write(tmp_path, [Event("epoch", 1, 5, {"loss": 2}), Event("epoch", 2, 10, {"loss": 9})])
    write(tmp_path, [Event("epoch", 2, 10, {"loss": 1})], step=7)
    assert [(row["epoch"], row["loss"]) for row in table(tmp_path)] == [("1", "2"), ("2", "1")]


def test_what_json_has_no_number_for_is_null(tmp_path):
    write(tmp_path, [Event("step", 0, 1, {"loss": float("inf"), "lr": float("nan")})])
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


class Terminal(io.StringIO):
    def isatty(self):
        return True


EVENTS = [
    Event("start", 0, 0, {"num_steps": 4}),
    Event("step", 0, 2, {"loss": 1.25, "lr": 0.1}),
    Event("epoch", 1, 4, {"loss": 1.0, "top1": 0.75}),
]


def test_progress_is_json_lines_where_nobody_watches():
    stream = io.StringIO()
    with show_progress(stream) as listen:
        for event in EVENTS:
            listen(event)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines == [event.document() for event in EVENTS]


def test_several_students_have_a_bar_each(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with show_progress(stream) as listen:
        for event in EVENTS:
            for student in ("a", "b"):
                listen(event._replace(student=student))
    shown = stream.getvalue()
    assert "a: epoch 1" in shown
    assert "b: epoch 1" in shown
    assert shown.count("4/4") >= 2


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with show_progress(stream) as listen:
        for event in EVENTS:
            listen(event)
    assert "4/4" in stream.getvalue()
    assert "loss 1  top1 0.75  lr 0.1" in stream.getvalue()
