"""Settings that move: what a method is handed at each step, and what is refused."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
import yaml
from pydantic import ValidationError
from support.builds import record_toy
from support.steps import memory, settings_of, terms_of
from support.streams import plain_net, train_config, train_document

from cache_service.errors import ConfigError
from distill.config import load_config
from distill.methods import METHODS, kd
from distill.methods.setting_types import Schedule
from distill.reporting import read_metrics
from distill.stream import open_stream
from distill.trainer import train

LINE = {"schedule": "linear", "start": 20.0, "end": 4.0, "epochs": 10.0}


@pytest.fixture
def model():
    torch.manual_seed(3)
    return plain_net()


@pytest.mark.parametrize(
    ("epoch", "value"), [(-1, 20), (0, 20), (2.5, 16), (5, 12), (10, 4), (11, 4)]
)
def test_a_line_goes_from_start_to_end_and_stays(epoch, value):
    assert Schedule(**LINE).at(epoch) == pytest.approx(value)


@pytest.mark.parametrize(
    ("epoch", "value"), [(0, 20), (2.5, 17.65685424949238), (5, 12), (10, 4), (11, 4)]
)
def test_a_cosine_is_flat_at_both_ends(epoch, value):
    assert Schedule(**LINE | {"schedule": "cosine"}).at(epoch) == pytest.approx(value)


@pytest.mark.parametrize("epoch", [0.0, 0.5, 100.0])
def test_a_constant_is_constant(epoch):
    assert Schedule(schedule="constant", start=4.0).at(epoch) == 4.0


@pytest.mark.parametrize(
    ("epoch", "epochs", "factor"),
    [(0.0, 20, 0.05), (0.9, 20, 0.05), (18.5, 20, 0.95), (19, 20, 1), (240, 20, 1), (0.0, 0, 1)],
)
def test_a_warm_up_is_the_epochs_begun_over_its_length_and_at_most_1(model, epoch, epochs, factor):
    stream = memory()
    plain, _ = terms_of(settings_of("dkd", warmup_epochs=0), stream, model, epoch=epoch)
    warmed, _ = terms_of(settings_of("dkd", warmup_epochs=epochs), stream, model, epoch=epoch)
    assert warmed["soft"].item() == pytest.approx(factor * plain["soft"].item())
    assert warmed["label"] == plain["label"]


def moving_fields():
    """Every setting that may move, by asking for it."""
    for name, method in sorted(METHODS.items()):
        for field in sorted(method.settings.model_fields.keys() - {"name"}):
            try:
                settings_of(name, **{field: {"schedule": "constant", "start": 0.5}})
            except ValidationError:
                continue
            yield name, field


MOVING = sorted(moving_fields())


def test_every_temperature_share_and_weight_may_move():
    named = {
        (name, field)
        for name, method in METHODS.items()
        for field in method.settings.model_fields
        if field in {"alpha", "beta", "gamma", "mmd", "consistency", "weight"}
        or field.endswith(("temperature", "_weight"))
    }
    assert named == set(MOVING)


@pytest.mark.parametrize(
    ("epoch", "temperature"), [(0.0, 20.0), (2.5, 16.0), (10.0, 4.0), (99.0, 4.0)]
)
def test_a_method_is_handed_the_temperature_of_the_step(model, epoch, temperature):
    stream = memory()
    moved, metrics = terms_of(settings_of("kd", temperature=LINE), stream, model, epoch=epoch)
    still, _ = terms_of(settings_of("kd", temperature=temperature), stream, model)
    torch.testing.assert_close(moved, still)
    assert metrics["temperature"] == temperature


def test_a_cosine_is_half_a_cosine(model):
    stream, course = memory(), {**LINE, "schedule": "cosine"}
    moved, _ = terms_of(settings_of("kd", temperature=course), stream, model, epoch=2.5)
    wanted = 4 + 16 * 0.5 * (1 + math.cos(math.pi / 4))
    still, _ = terms_of(settings_of("kd", temperature=wanted), stream, model)
    torch.testing.assert_close(moved, still)


@pytest.mark.parametrize("course", ["linear", "cosine"])
def test_both_ends_are_met_exactly(course):
    schedule = Schedule[float](schedule=course, start=0.1, end=0.7, epochs=3)
    assert [schedule.at(0.0), schedule.at(3.0), schedule.at(7.0)] == [0.1, 0.7, 0.7]


@pytest.mark.parametrize("written", [{"start": 3.7}, {"start": 3.7, "end": 3.7, "epochs": 9}])
def test_a_constant_schedule_is_its_number_bit_for_bit(tmp_path, written):
    def losses(out, temperature):
        config = train_config(tmp_path / out, method={"name": "kd", "temperature": temperature})
        train(config, stream=memory())
        return [line["loss"] for line in read_metrics(str(tmp_path / out)) if "loss" in line]

    course = losses("course", {"schedule": "constant", **written})
    assert course == losses("number", 3.7)
    assert len(course) > 4


def test_what_moves_is_reported_at_every_step_and_what_stands_is_not(tmp_path):
    method = {"name": "kd", "temperature": {**LINE, "epochs": 2.0}, "alpha": 0.5}
    train(train_config(tmp_path, method=method, batch_size=8), stream=memory())
    steps = [line for line in read_metrics(str(tmp_path)) if line["kind"] == "step"]
    assert [line["temperature"] for line in steps] == pytest.approx(
        [20 - 16 * step / len(steps) for step in range(len(steps))]
    )
    assert all("alpha" not in line for line in steps)


@pytest.mark.parametrize(("name", "field"), MOVING)
def test_a_moving_setting_changes_the_loss_of_its_method(name, field, model):
    stream, ends = memory(), (0.25, 0.75)
    course = {"schedule": "linear", "start": ends[0], "end": ends[1], "epochs": 1.0}
    extra = {"teacher_weight": 1.0} if name == "peers" and field != "teacher_weight" else {}
    if "warmup_epochs" in METHODS[name].settings.model_fields:
        extra = {"warmup_epochs": 0}  # a warm-up would change the loss by itself
    other = plain_net()
    found = [
        terms_of(
            settings_of(name, **extra, **{field: value}),
            stream,
            model,
            epoch=epoch,
            others=[other],
        )[0]
        for value, epoch in ((course, 1.0), (ends[1], 1.0), (course, 0.0), (ends[0], 0.0))
    ]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[3], rtol=0, atol=0)
    assert found[0] != found[2]


def test_a_topk_cache_is_decoded_for_the_temperature_of_the_step(tmp_path, model):
    record_toy(str(tmp_path / "c"), codec={"kind": "topk", "k": 3}, scales=[1])
    method = {"name": "kd", "temperature": {**LINE, "epochs": 1.0}}
    config = train_config(
        tmp_path / "out",
        method=method,
        dataset={"name": "support.toys:patches", "args": {"num_samples": 96}},
        caches=str(tmp_path / "c"),
        epochs=1,
        batch_size=32,
    )
    stream = open_stream(config, device=torch.device("cpu"))
    temperatures, teacher_logits = [], stream.teacher_logits

    class Noting:
        facts = stream.facts

        def batches(self, first_step):
            return stream.batches(first_step)

        def teacher_logits(self, batch, *, temperature, cache):
            temperatures.append(temperature)
            return teacher_logits(batch, temperature=temperature, cache=cache)

    train(config, stream=Noting())
    assert temperatures == pytest.approx([20.0, 20 - 16 / 3, 20 - 32 / 3])


BAD = [
    ({**LINE, "schedule": "step"}, "schedule"),
    ({**LINE, "start": 0}, "start"),
    ({**LINE, "end": 1001}, "end"),
    ({**LINE, "end": float("nan")}, "end"),
    ({**LINE, "epochs": 0}, "epochs"),
    ({**LINE, "epochs": 100_001}, "epochs"),
    ({**LINE, "epochs": None}, "needs start, end and epochs"),
    ({"schedule": "cosine", "start": 4}, "needs start, end and epochs"),
    ({"schedule": "constant", "start": 4, "end": 5}, "stays at start=4, but end=5"),
    ({"schedule": "constant"}, "start"),
    ({**LINE, "stop": 4}, "stop"),
]


@pytest.mark.parametrize(("course", "says"), BAD)
def test_a_bad_schedule_is_one_line_that_names_its_key(tmp_path, course, says):
    document = train_document(str(tmp_path), method={"name": "kd", "temperature": course})
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError, match=says) as refusal:
        load_config(tmp_path / "train.yaml")
    assert "method.temperature" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize(
    ("field", "start", "end"),
    [("alpha", -0.1, 1), ("alpha", 0, 1.1), ("temperature", 4, 0), ("temperature", 1001, 1)],
)
def test_both_ends_are_bounded_as_the_number_is(field, start, end):
    course = {"schedule": "linear", "start": start, "end": end, "epochs": 5}
    with pytest.raises(ValidationError, match=field):
        settings_of("kd", **{field: course})


def test_a_method_with_schedules_keeps_its_docstring():
    assert inspect.getdoc(METHODS["kd"].terms) == inspect.getdoc(kd.kd)
