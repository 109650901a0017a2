"""Runs of students that teach themselves: stopped, killed, resumed, side by side."""

from __future__ import annotations

import pytest
from support.recorded_runs import AUGMENT
from support.runs import curve, same, state_of, stop_at
from support.streams import MemoryStream, train_config

from cache_service.errors import CorruptError
from distill.checkpoint import load_checkpoint
from distill.trainer import train, train_students

TOYS = {"name": "support.toys:patches", "args": {"num_samples": 96}}


def config_of(out, method, **changes):
    return train_config(
        out, method=method, **{"student__model_args": {"dropout": 0.3}, "epochs": 4} | changes
    )


METHODS = [
    {"name": "ddgsd"},
    {"name": "cs-kd"},
    {"name": "ps-kd"},
]


@pytest.mark.parametrize("stopped_at", [6, 14])
@pytest.mark.parametrize("method", METHODS, ids=lambda each: "-".join(map(str, each.values())))
def test_a_stopped_run_goes_on_to_the_same_curve_bit_for_bit(tmp_path, method, stopped_at):
    whole, parts = (config_of(tmp_path / name, method, epochs=3) for name in ("whole", "parts"))
    train(whole, stream=MemoryStream(whole))
    with pytest.raises(KeyboardInterrupt):
        train(parts, stream=MemoryStream(parts), on_event=stop_at(stopped_at))
    train(parts, stream=MemoryStream(parts))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("every", "died_at"),
    [
        ({"steps": 4}, 9),  # within the epoch of its checkpoint
        ({"steps": 4}, 14),  # an epoch on
        ({"epochs": 1}, 12),  # at the border
        ({"epochs": 2}, 23),  # two epochs on
        ({"steps": 100}, 16),  # before any checkpoint
    ],
)
def test_a_killed_run_recalls_what_its_checkpoint_needs(tmp_path, every, died_at):
    method = {"name": "ps-kd"}
    whole, parts = (
        config_of(tmp_path / name, method, checkpoint_every=every) for name in ("whole", "parts")
    )
    train(whole, stream=MemoryStream(whole))

    def die(event):
        if event.kind == "step" and event.step == died_at:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(parts, stream=MemoryStream(parts), on_event=die)
    train(parts, stream=MemoryStream(parts))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_a_new_run_never_recalls_what_another_left_in_its_folder(tmp_path):
    config, other = (config_of(tmp_path / name, {"name": "ps-kd"}) for name in ("a", "b"))
    train(config, stream=MemoryStream(config, seeds=(7, 8)))
    (tmp_path / "a" / "checkpoint.pt").unlink()
    for each in (config, other):
        train(each, stream=MemoryStream(each))
    same(state_of(tmp_path / "a"), state_of(tmp_path / "b"))


def test_a_resumed_run_whose_prediction_history_are_gone_is_refused(tmp_path):
    config = config_of(tmp_path, {"name": "ps-kd"})
    with pytest.raises(KeyboardInterrupt):
        train(config, stream=MemoryStream(config), on_event=stop_at(9))
    (left,) = [p for p in (tmp_path / "prediction_history").iterdir() if p.name == "000000.rows"]
    left.unlink()
    with pytest.raises(CorruptError, match="predictions of epoch 0, but the file is missing"):
        train(config, stream=MemoryStream(config))


def test_prediction_history_take_two_epochs_of_disk_at_most(tmp_path):
    config, most = config_of(tmp_path, {"name": "ps-kd"}, epochs=6), []

    def count(event):
        if event.kind == "checkpoint":
            most.append(len(list((tmp_path / "prediction_history").iterdir())))

    train(config, stream=MemoryStream(config), on_event=count)
    assert most == [1] * 6


def test_ps_kd_reports_its_weight_and_what_it_recalls(tmp_path):
    config = config_of(tmp_path, {"name": "ps-kd"})
    train(config, stream=MemoryStream(config))
    epochs = [line for line in curve(tmp_path) if line["kind"] == "epoch"]
    assert [line["alpha"] for line in epochs] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [line["recalled"] for line in epochs] == [0, 1, 1, 1]


@pytest.mark.parametrize("method", ["ddgsd", "cs-kd", "ps-kd"])
def test_a_student_learns_from_itself_over_real_views(tmp_path, method):
    config = train_config(
        tmp_path,
        method={"name": method},
        dataset={"name": "support.confusable:groups", "args": {"num_samples": 120}},
        caches=[],
        augment={"preset": "none", "size": 8},
        student={"model": "support.confusable:narrow", "model_args": {"width": 5}},
        optimizer={"name": "sgd", "lr": 0.005, "momentum": 0.9},
        epochs=5,
        batch_size=10,
    )
    train(config)
    right = [line["top1"] for line in curve(tmp_path) if line["kind"] == "epoch"]
    assert right[-1] > max(right[0] + 0.2, 0.5)


def test_the_pairs_of_a_student_move_nothing_of_another_beside_it(tmp_path):
    def config(out, name):
        return train_config(
            tmp_path / out,
            method={"name": name},
            dataset=TOYS,
            caches=[],
            augment=AUGMENT["plain"],
            student={"model": "support.streams:normed_net"},
            epochs=2,
            batch_size=32,
        )

    train(config("alone", "ce"))
    names = ["ce", "ddgsd", "cs-kd", "ps-kd"]
    train_students({name: config(name, name) for name in names})
    for name in names:
        assert load_checkpoint(tmp_path / name)["history"]["step"] == 6
    same(state_of(tmp_path / "ce"), state_of(tmp_path / "alone"))
