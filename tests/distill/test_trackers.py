"""TensorBoard and W&B: only where asked, and the same run after a stop."""

from __future__ import annotations

import sys
import types

import pytest
from support.runs import stop_at
from support.streams import MemoryStream, train_config

from cache_service.errors import ConfigError
from distill.reporting import Event, trackers_of
from distill.trainer import train, train_students

EVENTS = [
    Event("start", 0, 0, {"model": "m", "num_steps": 4}),
    Event("step", 0, 1, {"loss": 0.5, "note": "text", "none": None}),
]


class FakeWandb(types.ModuleType):
    """Takes what the real one takes: keyword arguments of `init`, `log` with a step, `finish`."""

    class errors:
        class Error(Exception):
            pass

    def __init__(self, refuses=None):
        super().__init__("wandb")
        self.runs, self._refuses = [], refuses

    def init(self, **settings):
        if self._refuses:
            raise self.errors.Error(self._refuses)
        run = types.SimpleNamespace(settings=settings, logged=[], finished=False)
        run.log = lambda numbers, *, step: run.logged.append((step, numbers))
        run.finish = lambda: setattr(run, "finished", True)
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def tell(config, *, step=0):
    (tracker,) = trackers_of(config, step=step)
    with tracker as listen:
        for event in EVENTS:
            listen(event)


@pytest.mark.parametrize(
    ("changes", "module", "says", "extra"),
    [
        (
            {"tensorboard": True},
            "torch.utils.tensorboard",
            "tensorboard: true needs TensorBoard",
            "track",
        ),
        ({"wandb": "kd"}, "wandb", "wandb: kd needs Weights & Biases", "wandb"),
    ],
)
def test_what_is_not_installed_is_one_line_with_the_command(
    tmp_path, monkeypatch, changes, module, says, extra
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{says}\. Run `pip install 'kd-cache\[{extra}\]'"):
        tell(train_config(tmp_path, **changes))


def test_nothing_is_imported_that_was_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert trackers_of(train_config(tmp_path), step=0) == []


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboard")
    tell(train_config(tmp_path, tensorboard=True))
    assert list((tmp_path / "tensorboard").iterdir())


def test_wandb_gets_every_number_at_its_step_and_no_address(tmp_path, wandb):
    tell(train_config(tmp_path / "run", wandb="kd", caches=["s3://secret/cache"]))
    (run,) = wandb.runs
    assert run.logged == [(1, {"step/loss": 0.5})]
    assert run.finished
    assert (run.settings["project"], run.settings["name"]) == ("kd", "run")
    assert run.settings["config"]["method"]["temperature"] == 4
    assert "secret" not in str(run.settings["config"])


def test_a_run_that_resumes_is_the_same_run_there_and_a_new_one_is_not(tmp_path, wandb):
    config = train_config(tmp_path, wandb="kd")
    with pytest.raises(KeyboardInterrupt):
        train(config, stream=MemoryStream(config), on_event=stop_at(5))
    train(config, stream=MemoryStream(config))
    (tmp_path / "checkpoint.pt").unlink()
    train(config, stream=MemoryStream(config))
    first, resumed, anew = (run.settings["id"] for run in wandb.runs)
    assert first == resumed != anew
    steps = [step for run in wandb.runs[:2] for step, told in run.logged if "step/loss" in told]
    assert steps == list(range(1, 13))


def test_several_students_are_several_runs(tmp_path, wandb):
    configs = {name: train_config(tmp_path / name, wandb="kd") for name in ("a", "b")}
    train_students(configs, stream=MemoryStream(configs["a"]))
    assert [run.settings["name"] for run in wandb.runs] == ["a", "b"]
    assert {run.settings["reinit"] for run in wandb.runs} == {"create_new"}
    assert len({run.settings["id"] for run in wandb.runs}) == 2


def test_a_refusal_of_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(refuses="no API key\nmore"))
    with pytest.raises(ConfigError, match=r"project kd: no API key\. Run `wandb login`") as refusal:
        tell(train_config(tmp_path, wandb="kd"))
    assert "\n" not in str(refusal.value)
