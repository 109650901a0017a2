"""A checkpoint with raw and averaged weights: neither is taken by accident."""

from __future__ import annotations

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from cache_service.errors import ConfigError
from cache_service.models.create import create_model
from cache_service.models.weights import load_checkpoint
from cache_service.models.weights_digest import weights_sha256


@pytest.fixture
def raw():
    return create_model("resnet8x4", num_classes=4, seed=1)


@pytest.fixture
def averaged():
    return create_model("resnet8x4", num_classes=4, seed=2)


@pytest.fixture
def fresh():
    return create_model("resnet8x4", num_classes=4, seed=3)


def prefixed(weights):
    return {f"module.{key}": value for key, value in weights.items()}


LAYOUTS = {
    "timm": ("state_dict_ema", lambda r, a: {"state_dict": r, "state_dict_ema": a, "epoch": 9}),
    "deit": ("model_ema", lambda r, a: {"model": r, "model_ema": a}),
    "torchvision": (
        "model_ema",
        lambda r, a: {"model": r, "model_ema": {"n_averaged": torch.tensor(9), **prefixed(a)}},
    ),
    "nested": ("ema", lambda r, a: {"model": r, "ema": {"module": a, "decay": 0.999}}),
    "parallel": ("ema_state_dict", lambda r, a: {"net": prefixed(r), "ema_state_dict": a}),
    "averaged first": ("swa_model", lambda r, a: {"swa_model": a, "state_dict": r}),
    "basicsr": ("params_ema", lambda r, a: {"params": r, "params_ema": a}),
}


@pytest.mark.parametrize(("key", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_two_kinds_of_weights_are_refused_until_one_is_chosen(
    key, layout, raw, averaged, fresh, tmp_path
):
    path = tmp_path / "best.pth"
    torch.save(layout(raw.state_dict(), averaged.state_dict()), path)
    before = weights_sha256(fresh)
    with pytest.raises(ConfigError, match=rf"averaged ones \(EMA\) under '{key}'") as refusal:
        load_checkpoint(fresh, path)
    assert "`checkpoint_weights: averaged`" in refusal.value.hint
    assert "\n" not in str(refusal.value)
    assert weights_sha256(fresh) == before
    told = load_checkpoint(fresh, path, weights="averaged")
    assert weights_sha256(fresh) == weights_sha256(averaged)
    assert told == f"averaged weights, {key} of best.pth"
    told = load_checkpoint(fresh, path, weights="raw")
    assert weights_sha256(fresh) == weights_sha256(raw)
    assert told.startswith("raw weights, ")


def test_an_average_that_equals_the_raw_weights_needs_no_choice(raw, fresh, tmp_path):
    torch.save({"model": raw.state_dict(), "ema": raw.state_dict()}, tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(raw)


@pytest.mark.parametrize("wrap", [lambda w: {"model_ema": w}, lambda w: w], ids=["keyed", "bare"])
def test_averaged_weights_alone_are_loaded_and_named(wrap, averaged, fresh, tmp_path):
    torch.save(wrap(AveragedModel(averaged).state_dict()), tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(averaged)
    with pytest.raises(ConfigError, match="holds no raw weights, only averaged ones"):
        load_checkpoint(fresh, tmp_path / "a.pth", weights="raw")


def test_averaged_weights_that_are_not_there_are_refused(raw, fresh, tmp_path):
    torch.save({"model": raw.state_dict()}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="no averaged weights, only raw ones under 'model'"):
        load_checkpoint(fresh, tmp_path / "a.pth", weights="averaged")


def test_several_averages_are_refused_by_name(raw, averaged, fresh, tmp_path):
    content = {"model": raw.state_dict(), "ema_0.9": averaged.state_dict(), "ema_0.99": {}}
    content["ema_0.99"] = fresh.state_dict()
    torch.save(content, tmp_path / "a.pth")
    for choice in (None, "averaged"):
        with pytest.raises(ConfigError, match=r"several averages .*'ema_0.9', 'ema_0.99'"):
            load_checkpoint(fresh, tmp_path / "a.pth", weights=choice)
    load_checkpoint(fresh, tmp_path / "a.pth", weights="raw")


def test_an_average_of_something_else_is_not_taken_for_weights(raw, fresh, tmp_path):
    content = {"model": raw.state_dict(), "ema": {"loss": torch.tensor(0.4)}}
    torch.save(content, tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(raw)


def test_a_student_starts_from_the_weights_that_were_chosen(raw, averaged, tmp_path):
    torch.save({"model": raw.state_dict(), "ema": averaged.state_dict()}, tmp_path / "a.pth")
    options = {"num_classes": 4, "checkpoint": tmp_path / "a.pth"}
    with pytest.raises(ConfigError, match="they differ"):
        create_model("resnet8x4", **options)
    student = create_model("resnet8x4", **options, checkpoint_weights="averaged")
    assert weights_sha256(student) == weights_sha256(averaged)
