from __future__ import annotations

import collections
import copy
import re

import pytest
import torch
from safetensors.torch import save_file

from cache_service.errors import ConfigError
from cache_service.models.create import create_model
from cache_service.models.weights import load_checkpoint
from cache_service.models.weights_digest import weights_sha256


class Opaque:
    """What must never be unpickled."""


@pytest.fixture
def trained():
    return create_model("resnet8", num_classes=4, seed=1)


@pytest.fixture
def fresh():
    return create_model("resnet8", num_classes=4, seed=2)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 240},
        lambda weights: {"model": weights, "best_acc": torch.tensor(79.4)},
        lambda weights: {"model": {f"module.{key}": value for key, value in weights.items()}},
        lambda weights: {f"_orig_mod.module.{key}": value for key, value in weights.items()},
        lambda weights: {f"module._orig_mod.{key}": value for key, value in weights.items()},
        lambda weights: {k: v for k, v in weights.items() if "num_batches" not in k},
    ],
    ids=["bare", "nested", "published", "parallel", "compiled", "both", "before batches counted"],
)
def test_weights_are_found_however_they_were_saved(wrap, trained, fresh, tmp_path):
    torch.save(wrap(dict(trained.state_dict())), tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(trained)


def test_safetensors_are_read(trained, fresh, tmp_path):
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    load_checkpoint(fresh, str(tmp_path / "a.safetensors"))
    assert weights_sha256(fresh) == weights_sha256(trained)


def without(weights, key):
    return {name: value for name, value in weights.items() if name != key}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: without(w, "fc.bias"), r"fit ResNet: it lacks fc\.bias\. Check"),
        (lambda w: w | {"head.bias": w["fc.bias"]}, r"it has the unknown head\.bias\. Check"),
        (
            lambda w: w | {"fc.bias": torch.zeros(5), "fc.weight": torch.zeros(5, 64)},
            r"fc\.weight is \[5, 64\] in the file and \[4, 64\] in the network \(and 1 more\)",
        ),
        (lambda w: {"model": "resnet"}, "no tensors: 'model' is a str. Save model.state_dict"),
        (lambda w: [1, 2], "holds a list where a state dict is needed"),
        (lambda w: {}, "holds an empty dict where a state dict is needed"),
        (lambda w: w | {"fc.bias": Opaque()}, r"fit ResNet: it lacks fc\.bias\. Check"),
        (lambda w: Opaque(), "holds a Opaque where a state dict is needed"),
        (
            lambda w: {key: value.numpy() for key, value in w.items()},
            "holds no tensors: 'conv1.weight' is a ndarray, .* more",
        ),
        (
            lambda w: w | {"fc.bias": w["fc.bias"].char()},
            r"fit ResNet: it holds fc\.bias as int8\. Give the weights as they were trained",
        ),
        (
            lambda w: w | {"fc.bias": w["fc.bias"].to("meta")},
            r"fit ResNet: it holds no values of fc\.bias",
        ),
    ],
    ids=[
        "missing",
        "unknown",
        "shape",
        "no tensor",
        "list",
        "empty",
        "hole",
        "object",
        "arrays",
        "integers",
        "empty tensors",
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(
    change, says, trained, fresh, tmp_path
):
    torch.save(change(dict(trained.state_dict())), tmp_path / "a.pt")
    before = weights_sha256(fresh)
    with pytest.raises(ConfigError, match=says) as refusal:
        load_checkpoint(fresh, tmp_path / "a.pt")
    assert "\n" not in str(refusal.value)
    assert weights_sha256(fresh) == before


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x04junk", b"PK\x03\x04"])
def test_a_file_that_cannot_be_read_is_one_line(name, content, fresh, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"checkpoint .*{name}") as refusal:
        load_checkpoint(fresh, tmp_path / name)
    assert "\n" not in str(refusal.value)


def under(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


@pytest.mark.parametrize(
    "prefix", ["model.", "net.", "module.student.", "teacher.", "model._orig_mod.", "a.b.c."]
)
def test_a_prefix_that_all_keys_share_is_taken_off(prefix, trained, fresh, tmp_path):
    content = {"state_dict": under(prefix, trained.state_dict()), "epoch": 3}
    torch.save(content, tmp_path / "last.ckpt")
    told = load_checkpoint(fresh, tmp_path / "last.ckpt")
    assert weights_sha256(fresh) == weights_sha256(trained)
    rest = prefix.removeprefix("module.").replace("_orig_mod.", "")
    assert told == f"raw weights, state_dict (keys below {rest!r}) of last.ckpt"


def test_a_prefix_is_taken_off_a_bare_safetensors_file(trained, fresh, tmp_path):
    save_file(under("net.", trained.state_dict()), tmp_path / "a.safetensors")
    told = load_checkpoint(fresh, tmp_path / "a.safetensors")
    assert told == "raw weights, keys below 'net.' of a.safetensors"
    assert weights_sha256(fresh) == weights_sha256(trained)


def test_of_several_networks_the_one_that_fits_is_loaded(trained, fresh, tmp_path):
    other = create_model("resnet20", num_classes=4, seed=3).state_dict()
    content = under("model.student.", trained.state_dict()) | under("model.teacher.", other)
    torch.save({"state_dict": content}, tmp_path / "a.ckpt")
    assert "'model.student.'" in load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert weights_sha256(fresh) == weights_sha256(trained)


TWO_NETWORKS = {
    "mdistiller": (
        ("model.student", "model.teacher"),
        lambda s, t: {"model": under("module.student.", s) | under("module.teacher.", t)},
    ),
    "one at the top": (
        ("state_dict", "state_dict.teacher"),
        lambda s, t: {"state_dict": s | under("teacher.", t)},
    ),
    "top level": (("student", "teacher"), lambda s, t: {"student": s, "teacher": t}),
    "bare": ((".", "teacher"), lambda s, t: s | under("teacher.", t)),
    "best and last": (("last", "best.net"), lambda s, t: {"last": s, "best": {"net": t}}),
    "folds": (("0", "1"), lambda s, t: [s, t]),
}


@pytest.mark.parametrize(("names", "layout"), TWO_NETWORKS.values(), ids=TWO_NETWORKS)
def test_several_networks_that_fit_and_differ_are_refused_until_one_is_named(
    names, layout, trained, fresh, tmp_path
):
    other = create_model("resnet8", num_classes=4, seed=3)
    torch.save(layout(trained.state_dict(), other.state_dict()), tmp_path / "a.ckpt")
    before = weights_sha256(fresh)
    says = f"several networks that fit and differ: '{names[0]}', '{names[1]}'. "
    with pytest.raises(ConfigError, match=re.escape(says)) as refusal:
        load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert refusal.value.hint.endswith(f"such as `checkpoint_key: {names[0]}`.")
    assert weights_sha256(fresh) == before
    for name, network in zip(names, (trained, other), strict=True):
        load_checkpoint(fresh, tmp_path / "a.ckpt", key=name)
        assert weights_sha256(fresh) == weights_sha256(network)


@pytest.mark.parametrize("key", ["teacher", "module.teacher", "model.module.teacher.", "model.tea"])
def test_a_key_may_be_a_whole_part_of_the_name_with_or_without_wrappers(
    key, trained, fresh, tmp_path
):
    other = create_model("resnet8", num_classes=4, seed=3)
    weights = under("module.student.", trained.state_dict())
    torch.save(
        {"model": weights | under("module.teacher.", other.state_dict())}, tmp_path / "a.pth"
    )
    if key.endswith("tea"):
        with pytest.raises(ConfigError, match=r"that fit are 'model\.student', 'model\.teach"):
            load_checkpoint(fresh, tmp_path / "a.pth", key=key)
        return
    told = load_checkpoint(fresh, tmp_path / "a.pth", key=key)
    assert told == "raw weights, model (keys below 'teacher.') of a.pth"
    assert weights_sha256(fresh) == weights_sha256(other)


def test_a_key_of_weights_that_do_not_fit_says_how_they_differ(trained, fresh, tmp_path):
    other = create_model("resnet20", num_classes=4, seed=3).state_dict()
    torch.save({"student": trained.state_dict(), "teacher": other}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"under 'teacher' it .* It fits resnet20 with 4"):
        load_checkpoint(fresh, tmp_path / "a.pth", key="teacher")
    with pytest.raises(ConfigError, match=r"no weights of ResNet under checkpoint_key: 'x'.*'stud"):
        load_checkpoint(fresh, tmp_path / "a.pth", key="x")
    assert load_checkpoint(fresh, tmp_path / "a.pth").startswith("raw weights, student of")


def test_several_networks_that_are_equal_need_no_choice(trained, fresh, tmp_path):
    weights = trained.state_dict()
    torch.save(under("student.", weights) | under("teacher.", weights), tmp_path / "a.ckpt")
    load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert weights_sha256(fresh) == weights_sha256(trained)


@pytest.mark.parametrize(
    "change",
    [
        lambda w: without(w, "model.fc.bias"),
        lambda w: w | {"model.head.bias": w["model.fc.bias"]},
        lambda w: w | {"model.fc.bias": torch.zeros(5)},
        lambda w: {key.replace("model.", "model_"): value for key, value in w.items()},
    ],
    ids=["missing", "unknown", "shape", "no dot"],
)
def test_below_a_prefix_nothing_is_loaded_in_part(change, trained, fresh, tmp_path):
    torch.save({"state_dict": change(under("model.", trained.state_dict()))}, tmp_path / "a.ckpt")
    before = weights_sha256(fresh)
    says = "does not fit ResNet: (under 'state_dict.model' it|under 'state_dict' it lacks conv1)"
    with pytest.raises(ConfigError, match=says):
        load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert weights_sha256(fresh) == before


@pytest.mark.parametrize("average", ["whole", "without buffers"])
def test_a_prefix_does_not_hide_an_average_of_the_weights(average, trained, fresh, tmp_path):
    ema = create_model("resnet8", num_classes=4, seed=3)
    values = (
        ema.state_dict() if average == "whole" else under("model.", dict(ema.named_parameters()))
    )
    content = {"state_dict": under("model.", trained.state_dict()), "ema": values}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match=r"raw weights under 'state_dict\.model' and averaged"):
        load_checkpoint(fresh, tmp_path / "a.ckpt")
    load_checkpoint(fresh, tmp_path / "a.ckpt", weights="raw")
    assert weights_sha256(fresh) == weights_sha256(trained)


def by_part(weights):
    """The state dicts of the network's modules, each saved under its name."""
    parts = collections.defaultdict(dict)
    for key, value in weights.items():
        part, _, rest = key.partition(".")
        parts[part][rest] = value
    return dict(parts)


WRAPPED = {
    "deepspeed": lambda w: {"module": w, "ds_config": {}},
    "params": lambda w: {"params": w},
    "hydra": lambda w: {"state": {"model": {"weights": w}}},
    "part in parallel": lambda w: {
        key.replace("layer1.", "layer1.module.").replace("fc.", "module.fc."): value
        for key, value in w.items()
    },
    "compiled part": lambda w: {k.replace("layer2.", "layer2._orig_mod."): v for k, v in w.items()},
    "sharded": lambda w: under("_fsdp_wrapped_module.", w),
    "checkpointed": lambda w: {
        k.replace("layer2.0.", "layer2.0._checkpoint_wrapped_module."): v for k, v in w.items()
    },
    "beside a loss": lambda w: {"state_dict": under("net.", w) | {"loss.weight": torch.zeros(3)}},
    "beside another": lambda w: {"net": w, "head": {"weight": torch.zeros(3)}},
    "parts": lambda w: by_part(w) | {"optimizer": {"fc": torch.zeros(1)}, "loss": 0.3},
    "parts of a part": lambda w: {"state": {"net": by_part(w)}, "epoch": 3},
    "parameters": lambda w: {key: torch.nn.Parameter(v, False) for key, v in w.items()},
    "sparse": lambda w: w | {"fc.weight": w["fc.weight"].to_sparse()},
    "half": lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_weights_are_found_under_any_key_and_in_any_wrapper(wrap, trained, fresh, tmp_path):
    trained.half().float()
    torch.save(wrap(dict(trained.state_dict())), tmp_path / "a.pt")
    load_checkpoint(fresh, tmp_path / "a.pt")
    assert weights_sha256(fresh) == weights_sha256(trained)


def test_a_larger_network_is_not_loaded_in_part(tmp_path):
    small = create_model("resnet8", num_classes=4)
    torch.save(create_model("resnet14", num_classes=4).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r"it has the unknown .* It fits resnet14 with 4 cl"):
        load_checkpoint(small, tmp_path / "a.pth", model_name="resnet8")


def test_a_list_that_holds_itself_ends(fresh, tmp_path):
    endless = []
    endless += [endless] * 20
    torch.save({"a": endless, "b": {"c": torch.zeros(1)}}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="does not fit"):
        load_checkpoint(fresh, tmp_path / "a.pth")


def test_one_bit_changes_the_digest(trained):
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other.fc.bias.view(torch.int32)[0] ^= 1
    assert weights_sha256(other) != weights_sha256(trained)


def test_dtype_and_shape_are_part_of_the_digest(trained):
    other = copy.deepcopy(trained).bfloat16()
    assert weights_sha256(other) != weights_sha256(trained)
    flat, square = torch.nn.Module(), torch.nn.Module()
    flat.register_buffer("a", torch.zeros(4))
    square.register_buffer("a", torch.zeros(2, 2))
    assert weights_sha256(flat) != weights_sha256(square)


def test_memory_format_and_compilation_do_not_change_the_digest(trained):
    other = copy.deepcopy(trained).to(memory_format=torch.channels_last)
    assert weights_sha256(torch.compile(other, backend="eager")) == weights_sha256(trained)


def test_the_digest_is_pinned():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.zero_()
    wanted = "0f123fd1b3cc8316541693562cfa73d89c8175af85de592fd26ed59de8a8a3e4"
    assert weights_sha256(model) == wanted
