from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from cache_service.errors import ConfigError
from cache_service.models.create import create_model
from cache_service.models.weights import load_checkpoint, weights_sha256


class Opaque:
    """What must never be unpickled."""


@pytest.fixture
def trained():
    return create_model("resnet8x4", num_classes=4, seed=1)


@pytest.fixture
def fresh():
    return create_model("resnet8x4", num_classes=4, seed=2)


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
            lambda w: w | {"fc.bias": torch.zeros(5), "fc.weight": torch.zeros(5, 256)},
            r"fc\.weight is \[5, 256\] in the file and \[4, 256\] in the network \(and 1 more\)",
        ),
        (lambda w: {"model": "resnet"}, "'model' is a str. Save model.state_dict"),
        (lambda w: [1, 2], "holds a list where a state dict is needed"),
        (lambda w: {}, "holds a dict where a state dict is needed"),
        (
            lambda w: w | {"x": Opaque()},
            "is not plain weights, and unpickling anything else can run",
        ),
    ],
    ids=["missing", "unknown", "shape", "no tensor", "list", "empty", "object"],
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


def test_a_missing_file_is_named(fresh, tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.pt is not a file"):
        load_checkpoint(fresh, tmp_path / "nowhere.pt")
    with pytest.raises(ConfigError, match="is not a file"):
        load_checkpoint(fresh, tmp_path)


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
