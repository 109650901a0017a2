"""Whole runs: reported, stopped, resumed, refused."""

from __future__ import annotations

import csv
import io
import signal
import threading
from itertools import islice

import pytest
import torch
from support import runs
from support.runs import curve, same, state_of
from support.streams import MemoryStream, train_config
from support.toys import NUM_CLASSES
from torch import nn

from cache_service.errors import ConfigError, NonFiniteError, SpecMismatchError
from cache_service.interrupts import StoppedWaitingError
from distill.checkpoint import load_checkpoint
from distill.config import load_config
from distill.finite import NonFiniteCheck
from distill.reporting import read_metrics
from distill.stream import LiveTeacher
from distill.trainer import train

NUM_STEPS = 12  # 22 views in batches of 4, two epochs

RICH = {
    "student__model_args": {"dropout": 0.3},
    "method": {"name": "sd-kd"},
    "ema": 0.8,
    "clip_grad_norm": 1.0,
    "schedule": {"name": "cosine", "warmup_epochs": 0.5},
    "label_smoothing": 0.1,
}
"""A run in which everything that has a state is on."""


class EndlessWait(MemoryStream):
    """A stream whose sixth batch does not come until somebody stops the run."""

    def batches(self, first_step):
        yield from islice(super().batches(first_step), 5)
        raise StoppedWaitingError


def run(config, *, stop_at=None, **arguments):
    """Train; with `stop_at`, until that step is reported."""
    stream = arguments.pop("stream", None) or MemoryStream(config)
    return train(config, stream=stream, on_event=runs.stop_at(stop_at), **arguments)


def test_a_student_learns(tmp_path):
    config = train_config(tmp_path, epochs=30, optimizer__lr=0.5)
    result = run(config, stream=MemoryStream(config, seeds=(0,)))
    losses = [line["loss"] for line in curve(tmp_path) if line["kind"] == "epoch"]
    assert len(losses) == 30
    assert losses[-1] < 0.9 * losses[0]
    assert result.history.step == 30 * 6
    assert not result.student.model.training


@pytest.mark.parametrize("stop_at", [1, 4, 6, 7, 11, 12])
def test_a_stopped_run_goes_on_to_the_same_curve_bit_for_bit(tmp_path, stop_at):
    run(train_config(tmp_path / "whole", **RICH))
    with pytest.raises(KeyboardInterrupt):
        run(train_config(tmp_path / "parts", **RICH), stop_at=stop_at)
    assert load_checkpoint(tmp_path / "parts")["history"]["step"] == stop_at
    run(train_config(tmp_path / "parts", **RICH))
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_a_run_stopped_at_every_step_is_still_the_same_run(tmp_path):
    run(train_config(tmp_path / "whole", **RICH))
    config = train_config(tmp_path / "parts", **RICH)
    for step in range(1, NUM_STEPS + 1):
        with pytest.raises(KeyboardInterrupt):
            run(config, stop_at=step)
    run(config)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_stopped_while_it_waits_for_a_batch_has_saved_every_step_so_far(tmp_path, accumulate):
    run(train_config(tmp_path / "whole", accumulate=accumulate, **RICH))
    config = train_config(tmp_path / "parts", accumulate=accumulate, **RICH)
    with pytest.raises(StoppedWaitingError):
        run(config, stream=EndlessWait(config))
    assert load_checkpoint(tmp_path / "parts")["history"]["step"] == 5 // accumulate * accumulate
    run(config)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_a_run_killed_between_checkpoints_repeats_the_steps_since_and_reports_them_once(tmp_path):
    run(train_config(tmp_path / "whole", **RICH))
    config = train_config(tmp_path / "parts", checkpoint_every={"steps": 4}, **RICH)

    def die(event):
        if event.kind == "step" and event.step == 7:
            raise MemoryError

    with pytest.raises(MemoryError):
        train(config, stream=MemoryStream(config), on_event=die)
    assert load_checkpoint(tmp_path / "parts")["history"]["step"] == 4
    run(config)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_accumulated_batches_resume_on_a_group_border(tmp_path):
    run(train_config(tmp_path / "whole", accumulate=4, **RICH))
    config = train_config(tmp_path / "parts", accumulate=4, **RICH)
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at=4)
    run(config)
    steps = [line["step"] for line in curve(tmp_path / "parts") if line["kind"] == "step"]
    assert steps == [4, 6, 10, 12]
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_every_step_of_a_compiled_student_runs_compiled_code_to_the_same_curve(
    tmp_path, monkeypatch
):
    run(train_config(tmp_path / "plain", **RICH))
    compiled, steps = torch.compile, []

    def counted(function, **options):
        code = compiled(function, **options)
        return lambda images: steps.append(images.shape) or code(images)

    monkeypatch.setattr(torch, "compile", counted)
    with torch.compiler.set_stance("force_eager"):  # generating the code takes half a minute
        run(train_config(tmp_path / "compiled", compile=True, **RICH))
    assert len(steps) == NUM_STEPS
    assert curve(tmp_path / "compiled") == curve(tmp_path / "plain")
    same(state_of(tmp_path / "compiled"), state_of(tmp_path / "plain"))


def test_the_learning_rate_counts_updates_and_not_batches(tmp_path):
    schedule = {"name": "multistep", "milestones": [1], "warmup_epochs": 0.5}
    run(train_config(tmp_path, accumulate=2, schedule=schedule))
    rates = [line["lr"] for line in curve(tmp_path) if line["kind"] == "step"]
    assert rates == pytest.approx([0.1 * 2 / 3, 0.1, 0.1, 0.01, 0.01, 0.01])


def test_float16_resumes_its_scale_too(tmp_path):
    run(train_config(tmp_path / "whole", amp="float16", **RICH))
    config = train_config(tmp_path / "parts", amp="float16", **RICH)
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at=5)
    run(config)
    assert load_checkpoint(tmp_path / "parts")["scaler"]["_growth_tracker"] == NUM_STEPS
    same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_a_finished_run_is_not_trained_again(tmp_path):
    config = train_config(tmp_path)
    first = run(config)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    again = run(config)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert again.history.step == NUM_STEPS
    same(again.student.model.state_dict(), first.student.model.state_dict())


@pytest.mark.parametrize(
    ("every", "accumulate", "steps"),
    [
        ({"steps": 5}, 1, [5, 10, 12]),
        ({"steps": 5}, 2, [6, 10, 12]),
        ({"epochs": 1}, 1, [6, 12]),
        ({"epochs": 2}, 1, [12]),
    ],
)
def test_checkpoints_come_as_often_as_asked_and_at_the_end(tmp_path, every, accumulate, steps):
    seen = []
    config = train_config(tmp_path, checkpoint_every=every, accumulate=accumulate)
    train(
        config,
        stream=MemoryStream(config),
        on_event=lambda event: seen.append(event.step) if event.kind == "checkpoint" else None,
    )
    assert seen == steps


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"optimizer__lr": 0.2}, "optimizer.lr=0.1 there and 0.2 here"),
        ({"method": {"name": "ce"}}, 'method.name="kd" there and "ce" here'),
        ({"epochs": 3}, "epochs=2 there and 3 here"),
        ({"ema": 0.9}, "ema=null there and 0.9 here"),
    ],
)
def test_another_config_is_refused_with_both_values(tmp_path, changes, says):
    run(train_config(tmp_path))
    with pytest.raises(ConfigError, match=says) as refused:
        run(train_config(tmp_path, **changes))
    assert "Choose another `out`" in str(refused.value)
    assert refused.value.exit_code == 2


def test_what_does_not_bend_the_curve_may_change(tmp_path):
    run(train_config(tmp_path))
    run(
        train_config(
            tmp_path,
            workers=3,
            log_every=9,
            checkpoint_every={"steps": 2},
            caches=["moved/elsewhere"],
            replay={"max_drift": 4},
        )
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"caches": ["a" * 64]}, r'on caches \["ffff'),
        ({"seeds": [4]}, r"on seeds \[0, 1\], but this run has \[4\]"),
        ({"dataset": "other"}, 'on dataset "memory", but this run has "other"'),
    ],
)
def test_other_rows_are_refused(tmp_path, change, says):
    config = train_config(tmp_path)
    run(config)
    stream = MemoryStream(config)
    stream.facts = stream.facts._replace(identity=stream.facts.identity | change)
    with pytest.raises(SpecMismatchError, match=says) as refused:
        run(config, stream=stream)
    assert refused.value.exit_code == 3


class Spoiling(MemoryStream):
    """Teachers that answer NaN from one step on."""

    spoiled_from = 7

    def teacher_logits(self, batch, *, temperature, cache):
        logits_BRC = super().teacher_logits(batch, temperature=temperature, cache=cache)
        return logits_BRC * torch.nan if batch.cursor.step >= self.spoiled_from else logits_BRC


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_samples(tmp_path):
    config = train_config(tmp_path)
    samples = MemoryStream(config).batch(7).samples_B.tolist()
    with pytest.raises(NonFiniteError, match="the loss of step 7 is not finite") as refused:
        run(config, stream=Spoiling(config))
    said = str(refused.value)
    assert "the loss of step 7 is not finite" in said
    assert "loss_soft=nan" in said
    assert "epoch 1, seed 1, positions [4, 8)" in said
    assert f"samples {', '.join(map(str, samples))}." in said


def test_a_loss_that_is_no_number_leaves_checkpoint_and_weights_alone(tmp_path):
    config = train_config(tmp_path)
    with pytest.raises(NonFiniteError, match="the loss of step 7 is not finite"):
        run(config, stream=Spoiling(config))
    saved = load_checkpoint(tmp_path)
    assert saved["history"]["step"] == 6
    run(config)  # the rows are good again
    run(train_config(tmp_path / "whole"))
    same(state_of(tmp_path), state_of(tmp_path / "whole"))


def test_where_looking_is_put_off_a_bad_loss_still_comes_before_the_checkpoint(
    tmp_path, monkeypatch
):
    waiting = NonFiniteCheck(torch.device("cuda"))  # looks only when it must, as on a GPU
    monkeypatch.setattr("distill.trainer.NonFiniteCheck", lambda *_: waiting)
    config = train_config(tmp_path, log_every=1000, checkpoint_every={"steps": 9})
    with pytest.raises(NonFiniteError, match="the loss of step 7 is not finite"):
        run(config, stream=Spoiling(config))
    assert load_checkpoint(tmp_path) is None


class RootNet(nn.Module):
    """The gradient of the root at 0 is infinite: NaN weights under finite losses."""

    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Linear(3, num_classes)
        self.offset = nn.Parameter(torch.zeros(()))

    def forward(self, images_B3HW):
        return self.head(images_B3HW.mean(dim=(2, 3))) + (0 * self.offset).abs().sqrt()


def root_net(num_classes=NUM_CLASSES):
    return RootNet(num_classes)


def test_spoiled_weights_are_never_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("support.streams.root_net", root_net, raising=False)
    config = train_config(
        tmp_path, student__model="support.streams:root_net", checkpoint_every={"steps": 1}
    )
    says = r"weights of the student are not finite after step 1 .*in offset"
    with pytest.raises(NonFiniteError, match=says):
        run(config)
    assert load_checkpoint(tmp_path) is None


def test_the_callers_generator_is_left_as_it_was(tmp_path):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    run(train_config(tmp_path, **RICH))
    same(torch.rand(3), wanted)


def test_the_callers_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    config = train_config(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at=2)
    run(config)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_in_another_thread_trains_too(tmp_path):
    thread = threading.Thread(target=run, args=(train_config(tmp_path),))
    thread.start()
    thread.join()
    assert load_checkpoint(tmp_path)["history"]["step"] == NUM_STEPS


def test_one_seed_gives_one_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(train_config(tmp_path / name, seed=seed, **RICH))
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert curve(tmp_path / "a") != curve(tmp_path / "c")


def test_a_live_teacher_that_says_what_is_recorded_gives_the_same_run(tmp_path):
    config = train_config(tmp_path / "cached", method={"name": "sd-kd"})
    stream = MemoryStream(config)
    answers = {
        batch.images_BHW3.numpy().tobytes(): batch.rows[0]["logits"] for batch in stream.batches(0)
    }
    teacher = LiveTeacher(stream.facts.teachers[0], lambda views: answers[views.numpy().tobytes()])
    run(config)
    live = train_config(tmp_path / "live", method={"name": "sd-kd"})
    run(live, stream=MemoryStream(live, num_teachers=0), teachers=[teacher])
    assert curve(tmp_path / "live") == curve(tmp_path / "cached")


def test_the_start_of_a_run_says_which_weights_were_loaded(tmp_path):
    first = run(train_config(tmp_path / "first", epochs=1))
    torch.save({"net": first.student.model.state_dict()}, tmp_path / "a.pth")
    run(train_config(tmp_path / "second", epochs=1, student__checkpoint=str(tmp_path / "a.pth")))
    starts = [read_metrics(tmp_path / name)[0] for name in ("first", "second")]
    assert [each["kind"] for each in starts] == ["start", "start"]
    assert "weights" not in starts[0]
    assert starts[1]["weights"] == "raw weights, net of a.pth"


def test_a_method_that_does_not_suit_is_refused_before_anything_is_read(tmp_path):
    config = train_config(tmp_path, method={"name": "sd-kd", "scales": [1, 4]})
    stream = MemoryStream(config)
    stream.batches = None  # would fail if it were called
    with pytest.raises(ConfigError, match="but memory has scales"):
        train(config, stream=stream)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_the_folder_holds_the_config_in_full_and_the_student(tmp_path):
    config = train_config(tmp_path, **RICH)
    result = run(config)
    assert load_config(tmp_path / "config.yaml") == config
    same(dict(result.student.model.state_dict()), dict(state_of(tmp_path)["ema"]))
    names = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    wanted = ["checkpoint.pt", "config.yaml", "metrics.csv", "metrics.jsonl", "student.safetensors"]
    assert names == wanted


@pytest.mark.parametrize("name", ["sd-kd", "sd-dkd", "sd-nkd"])
def test_what_cells_weigh_is_written_at_every_step_and_epoch(tmp_path, name):
    method = {"name": name, "complementary_weight": 3}
    config = train_config(tmp_path, method=method, epochs=1)
    train(config, stream=MemoryStream(config))
    lines = [line for line in read_metrics(str(tmp_path)) if line["kind"] in {"step", "epoch"}]
    (row,) = csv.DictReader(io.StringIO((tmp_path / "metrics.csv").read_text()))
    assert len(lines) == 7
    for found in [*lines, row]:
        share = float(found["complementary"])
        assert 0 < share < 1
        assert float(found["weight_consistent"]) == pytest.approx(1 - share)
        assert float(found["weight_complementary"]) == pytest.approx(3 * share)
