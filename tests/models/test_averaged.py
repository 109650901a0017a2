"""A checkpoint with raw and averaged weights: neither is taken by accident."""

from __future__ import annotations

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from cache_service.errors import ConfigError
from cache_service.models.create import create_model
from cache_service.models.weights import load_checkpoint
from cache_service.models.weights_digest import weights_sha256
from distill.config import StudentConfig
from distill.students import make_student


@pytest.fixture
def raw():
    return create_model("resnet8", num_classes=4, seed=1)


@pytest.fixture
def averaged():
    return create_model("resnet8", num_classes=4, seed=2)


@pytest.fixture
def fresh():
    return create_model("resnet8", num_classes=4, seed=3)


def under(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def prefixed(weights):
    return under("module.", weights)


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
    for choice, says in ((None, "holds raw weights under 'model'"), ("averaged", "several averag")):
        with pytest.raises(ConfigError, match=says) as refusal:
            load_checkpoint(fresh, tmp_path / "a.pth", weights=choice)
        assert "'ema_0.9', 'ema_0.99'" in refusal.value.message
    assert "`checkpoint_key: ema_0.9`, or `checkpoint_weights: raw`" in refusal.value.hint
    told = load_checkpoint(fresh, tmp_path / "a.pth", key="ema_0.9")
    assert told == "averaged weights, ema_0.9 of a.pth"
    assert weights_sha256(fresh) == weights_sha256(averaged)
    load_checkpoint(fresh, tmp_path / "a.pth", weights="raw")
    assert weights_sha256(fresh) == weights_sha256(raw)


def test_an_average_of_something_else_is_not_taken_for_weights(raw, fresh, tmp_path):
    content = {"model": raw.state_dict(), "ema": {"loss": torch.tensor(0.4)}}
    torch.save(content, tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(raw)


SWAPPED = {
    "lightning": (
        "current_model_state",
        lambda r, a: {
            "state_dict": under("net.", a),
            "current_model_state": under("net.", r),
            "averaging_state": {"n_averaged": torch.tensor(9)},
        },
    ),
    "openmmlab": (
        "ema_state_dict",
        lambda r, a: {
            "meta": {},
            "state_dict": a,
            "ema_state_dict": {"steps": torch.tensor(9), **prefixed(r)},
        },
    ),
}


@pytest.mark.parametrize(("key", "layout"), SWAPPED.values(), ids=SWAPPED)
def test_trainers_that_save_the_average_as_the_state_dict_are_understood(
    key, layout, raw, averaged, fresh, tmp_path
):
    torch.save(layout(raw.state_dict(), averaged.state_dict()), tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=rf"holds raw weights under '{key}\S*' and averaged"):
        load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert load_checkpoint(fresh, tmp_path / "a.ckpt", weights="averaged").startswith(
        "averaged weights, state_dict"
    )
    assert weights_sha256(fresh) == weights_sha256(averaged)
    load_checkpoint(fresh, tmp_path / "a.ckpt", weights="raw")
    assert weights_sha256(fresh) == weights_sha256(raw)


NESTED = {
    "lucidrains": lambda r, a: {
        **under("online_model.", r),
        **under("ema_model.", a),
        "initted": torch.tensor(True),
        "step": torch.tensor(9),
    },
    "lightning module": lambda r, a: {"state_dict": under("net.", r) | under("net_ema.", a)},
    "swa callback": lambda r, a: {
        "state_dict": under("net.", r),
        "callbacks": {"StochasticWeightAveraging": {"average_model_state": under("net.", a)}},
    },
    "averaged module": lambda r, a: {
        "state_dict": {
            **under("net.", r),
            "ema.n_averaged": torch.tensor(9),
            **under("ema.module.", a),
        }
    },
}


@pytest.mark.parametrize("layout", NESTED.values(), ids=NESTED)
def test_averages_below_a_prefix_or_deep_inside_are_told_from_raw_weights(
    layout, raw, averaged, fresh, tmp_path
):
    torch.save(layout(raw.state_dict(), averaged.state_dict()), tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=r"holds raw weights under .* and averaged ones"):
        load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert load_checkpoint(fresh, tmp_path / "a.ckpt", weights="averaged").startswith("averaged w")
    assert weights_sha256(fresh) == weights_sha256(averaged)
    load_checkpoint(fresh, tmp_path / "a.ckpt", weights="raw")
    assert weights_sha256(fresh) == weights_sha256(raw)


IN_PART = {
    "list": lambda m: {"ema": {"decay": 0.9, "shadow_params": list(m.parameters())}},
    "names without dots": lambda m: {
        "state": {f"model_ema.{k.replace('.', '')}": v for k, v in m.named_parameters()}
    },
    "no buffers": lambda m: {"ema": {"shadow": dict(m.named_parameters())}},
}


@pytest.mark.parametrize("layout", IN_PART.values(), ids=IN_PART)
def test_an_average_that_cannot_be_loaded_still_asks_for_a_choice(
    layout, raw, averaged, fresh, tmp_path
):
    torch.save({"model": raw.state_dict()} | layout(averaged), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="holds raw weights under 'model' and averaged ones"):
        load_checkpoint(fresh, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"does not fit ResNet.* it lacks "):
        load_checkpoint(fresh, tmp_path / "a.pth", weights="averaged")
    load_checkpoint(fresh, tmp_path / "a.pth", weights="raw")
    assert weights_sha256(fresh) == weights_sha256(raw)


def test_the_moments_of_an_optimizer_are_no_average(raw, fresh, tmp_path):
    moments = {"exp_avg": list(raw.parameters()), "state": dict(raw.named_parameters())}
    torch.save({"model": raw.state_dict(), "optimizer": moments}, tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(raw)


def test_a_student_starts_from_the_weights_that_were_chosen(raw, averaged, tmp_path):
    torch.save({"model": raw.state_dict(), "ema": averaged.state_dict()}, tmp_path / "a.pth")
    config = {"model": "resnet8", "checkpoint": str(tmp_path / "a.pth")}
    facts = {"num_classes": 4, "view_size": 32, "teacher": None, "seed": 0}
    with pytest.raises(ConfigError, match="they differ"):
        make_student(StudentConfig(**config), **facts)
    student = make_student(StudentConfig(**config, checkpoint_weights="averaged"), **facts)
    assert weights_sha256(student.model) == weights_sha256(averaged)
    assert student.weights_from == "averaged weights, ema of a.pth"
    student = make_student(StudentConfig(**config, checkpoint_key="model"), **facts)
    assert weights_sha256(student.model) == weights_sha256(raw)
