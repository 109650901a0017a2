from __future__ import annotations

import argparse
import copy
import json
import os
import pathlib
import zipfile

import numpy as np
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
            r"is not plain weights: it holds \S*test_weights\.Opaque, and unpickling that can run",
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
    rest = prefix.removeprefix("module.")
    assert told == f"raw weights, state_dict (keys below {rest!r}) of last.ckpt"


def test_a_prefix_is_taken_off_a_bare_safetensors_file(trained, fresh, tmp_path):
    save_file(under("net.", trained.state_dict()), tmp_path / "a.safetensors")
    assert load_checkpoint(fresh, tmp_path / "a.safetensors").endswith("(keys below 'net.')")
    assert weights_sha256(fresh) == weights_sha256(trained)


def test_of_several_networks_the_one_that_fits_is_loaded(trained, fresh, tmp_path):
    other = create_model("resnet20", num_classes=4, seed=3).state_dict()
    content = under("model.student.", trained.state_dict()) | under("model.teacher.", other)
    torch.save({"state_dict": content}, tmp_path / "a.ckpt")
    assert "'model.student.'" in load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert weights_sha256(fresh) == weights_sha256(trained)


@pytest.mark.parametrize("first", ["model.student.", ""])
def test_several_networks_that_fit_and_differ_are_refused_by_name(first, trained, fresh, tmp_path):
    other = create_model("resnet8x4", num_classes=4, seed=3).state_dict()
    content = under(first, trained.state_dict()) | under("model.teacher.", other)
    torch.save({"state_dict": content}, tmp_path / "a.ckpt")
    before = weights_sha256(fresh)
    says = f"several networks that fit ResNet and differ, below the prefixes '{first}', 'model.tea"
    with pytest.raises(ConfigError, match=says) as refusal:
        load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert "as a file of its own" in refusal.value.hint
    assert weights_sha256(fresh) == before


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
    with pytest.raises(ConfigError, match="does not fit ResNet: it lacks conv1"):
        load_checkpoint(fresh, tmp_path / "a.ckpt")
    assert weights_sha256(fresh) == before


@pytest.mark.parametrize("average", ["whole", "without buffers"])
def test_a_prefix_does_not_hide_an_average_of_the_weights(average, trained, fresh, tmp_path):
    ema = create_model("resnet8x4", num_classes=4, seed=3)
    values = (
        ema.state_dict() if average == "whole" else under("model.", dict(ema.named_parameters()))
    )
    content = {"state_dict": under("model.", trained.state_dict()), "ema": values}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="holds raw weights under 'state_dict' and averaged ones"):
        load_checkpoint(fresh, tmp_path / "a.ckpt")
    load_checkpoint(fresh, tmp_path / "a.ckpt", weights="raw")
    assert weights_sha256(fresh) == weights_sha256(trained)


BYSTANDERS = {
    "namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(seed=np.int64(3))),
    "scalars": [np.float64(79.4), np.float32(1), np.int64(7), np.bool_(True)],
    "dtypes": {"dtype": np.dtype("float16"), "big": np.dtype(">i4")},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("beside", BYSTANDERS.values(), ids=BYSTANDERS)
def test_harmless_objects_beside_the_weights_are_passed_over(
    beside, zipped, trained, fresh, tmp_path
):
    content = {"model": trained.state_dict(), "epoch": 9, "args": beside}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(trained)


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        (pathlib.PurePosixPath("runs"), r"pathlib\.\S*PurePosixPath"),
        (np.zeros(3), r"numpy\.\S*_reconstruct"),
        (print, r"builtins\.print"),
        (os.system, r"posix\.system"),
        (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
    ],
    ids=["path", "array", "function", "system", "module"],
)
def test_any_other_object_is_refused_by_name(beside, name, trained, fresh, tmp_path):
    torch.save({"model": trained.state_dict(), "args": beside}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=rf"it holds {name}, and unpickling") as refusal:
        load_checkpoint(fresh, tmp_path / "a.pth")
    assert "save model.state_dict() alone" in refusal.value.hint
    assert "weights_only" not in str(refusal.value)


def test_a_torchscript_archive_is_named(fresh, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        for name in ("version", "data.pkl", "constants.pkl"):
            archive.writestr(f"a/{name}", b"3\n")
    with pytest.raises(ConfigError, match="it is a TorchScript archive") as refusal:
        load_checkpoint(fresh, tmp_path / "a.pt")
    assert "weights_only" not in str(refusal.value)


def test_a_forged_dtype_beside_the_weights_never_reaches_numpy(trained, fresh, tmp_path):
    class Forged:
        def __reduce__(self):
            return np.dtype, ("not a type",)

    torch.save({"model": trained.state_dict(), "args": Forged()}, tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(trained)


def test_an_object_among_the_weights_is_no_bystander(trained, fresh, tmp_path):
    content = dict(trained.state_dict()) | {"args": argparse.Namespace()}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="holds no state dict: 'args' is a Namespace"):
        load_checkpoint(fresh, tmp_path / "a.pth")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 102502400\n"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    ("content", "says", "hint"),
    [
        (POINTER, "is a Git LFS pointer", "git lfs pull"),
        (b"\n <!DOCTYPE html><html>Sign in</html>", "is an HTML or XML page", "download the"),
        (b"<?xml version='1.0'?><Error/>", "is an HTML or XML page", "download the"),
        (b"", "is empty", "again"),
        (b"PK\x03\x04" + bytes(100), "is truncated: its 104 bytes begin as a zip", "again"),
    ],
    ids=["pointer", "html", "xml", "empty", "zip"],
)
def test_a_file_that_is_no_checkpoint_is_named(name, content, says, hint, fresh, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says) as refusal:
        load_checkpoint(fresh, tmp_path / name)
    assert hint in refusal.value.hint


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_truncated_files_are_named(kept, trained, fresh, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "a.pth")
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
        with pytest.raises(ConfigError, match=rf"{name} is truncated") as refusal:
            load_checkpoint(fresh, tmp_path / name)
        assert "compare its size" in refusal.value.hint


@pytest.mark.parametrize("header", [{"a": 1}, {"a": {"data_offsets": ["x", "y"]}}, {"a": {}}])
def test_a_header_of_nonsense_is_refused(header, fresh, tmp_path):
    text = json.dumps(header).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ConfigError, match=r"a\.safetensors cannot be read"):
        load_checkpoint(fresh, tmp_path / "a.safetensors")


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
