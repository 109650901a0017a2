"""Files of checkpoints: what is read of them, and what each other file is called."""

from __future__ import annotations

import argparse
import collections
import datetime as dt
import enum
import json
import os
import pathlib
import shutil
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
    return create_model("resnet8", num_classes=4, seed=1)


@pytest.fixture
def fresh():
    return create_model("resnet8", num_classes=4, seed=2)


def scale(x):
    return x


class Settings(dict):
    """A mapping of a trainer's own, such as EasyDict."""


class Record(list):
    """A list of a trainer's own."""


class Level(enum.Enum):
    LOW = 1


class Options:
    """An object of a trainer's own, with state in slots."""

    __slots__ = ("root",)

    def __init__(self):
        self.root = pathlib.PurePosixPath("runs")


def settings_with_losses():
    settings = Settings(lr=0.1, nested=Settings(seed=1))
    settings["losses"] = collections.defaultdict(list, {"train": [0.1, 0.2]})
    settings["record"] = Record([1, 2])
    return settings


BYSTANDERS = {
    "arrays": {"confusion": np.eye(3), "names": np.array(["a", "b"]), "none": np.zeros(0)},
    "own classes": [settings_with_losses(), Options(), Level.LOW, Opaque()],
    "values": [pathlib.PurePosixPath("runs"), dt.datetime(2024, 1, 1, tzinfo=dt.UTC), {1, 2}, 1j],
    "network": torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.GELU()),
    "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1),
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
    zipped = zipped or isinstance(beside, torch.nn.Module)  # the older form of those is refused
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(trained)


@pytest.mark.parametrize(
    ("beside", "name"),
    [
        (print, r"builtins\.print"),
        (os.system, r"posix\.system"),
        (shutil.rmtree, r"shutil\.rmtree"),
        (scale, r"\S*test_checkpoint_file\.scale"),
    ],
    ids=["builtin", "system", "library", "own"],
)
def test_functions_beside_the_weights_are_refused_by_name(beside, name, trained, fresh, tmp_path):
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


def test_objects_among_the_weights_are_passed_over(trained, fresh, tmp_path):
    content = dict(trained.state_dict()) | {"args": argparse.Namespace(), "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(trained)


def test_no_class_of_a_file_is_imported_or_called(trained, fresh, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(Opaque, "__setstate__", called.append, raising=False)
    monkeypatch.setattr(Settings, "__new__", lambda *_: called.append(1))
    settings = dict.__new__(Settings)
    content = {"model": trained.state_dict(), "args": [Opaque(), settings]}
    torch.save(content, tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert called == []


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: {"model": model, "epoch": 3},
        torch.nn.DataParallel,
        lambda model: torch.nn.Sequential(collections.OrderedDict(backbone=model)),
    ],
    ids=["bare", "keyed", "parallel", "inside"],
)
def test_a_network_that_was_pickled_whole_is_read_as_data(wrap, trained, fresh, tmp_path):
    trained.register_buffer("scratch", torch.zeros(3), persistent=False)
    torch.save(wrap(trained), tmp_path / "a.pth")
    load_checkpoint(fresh, tmp_path / "a.pth")
    assert weights_sha256(fresh) == weights_sha256(trained)


def test_a_network_that_an_old_torch_pickled_whole_is_named(trained, fresh, tmp_path):
    torch.save(trained, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ConfigError, match=r"a network that torch before 1\.6 pickled whole"):
        load_checkpoint(fresh, tmp_path / "a.pth")


def test_another_pickle_protocol_is_named(trained, fresh, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "a.pth", pickle_protocol=5)
    with pytest.raises(ConfigError, match="saved with another pickle_protocol than torch's own"):
        load_checkpoint(fresh, tmp_path / "a.pth")


def test_an_average_that_was_pickled_whole_is_seen(trained, fresh, tmp_path):
    averaged = create_model("resnet8", num_classes=4, seed=3)
    torch.save({"model": trained, "ema": averaged}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"raw weights under 'model' and averaged .* under 'ema'"):
        load_checkpoint(fresh, tmp_path / "a.pt")


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
        (b"\x1f\x8b\x08" + bytes(99), "is compressed by gzip", "Unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file", "save model.state_dict()"),
        (b"\x93NUMPY" + bytes(99), "is a NumPy array", "save model.state_dict()"),
        (bytes(257) + b"ustar\x0000", "is a tar archive", "Unpack it first"),
        (b'{"epoch": 3}', r"is a text file that begins with '\{\"epoch\": 3\}'", "file of the w"),
    ],
    ids=["pointer", "html", "xml", "empty", "zip", "gzip", "keras", "npy", "tar", "json"],
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


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (["model.safetensors", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"], 0),
        (["model.safetensors", "pytorch_model.bin", "training_args.bin"], 0),
        (["student.safetensors", "checkpoint.pt"], 0),
        (["net_final.pth", "optimizer.pt", "log.txt"], 0),
    ],
)
def test_the_weights_of_a_folder_are_found(names, taken, trained, fresh, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"other")
    save = save_file if names[taken].endswith("safetensors") else torch.save
    save(trained.state_dict(), tmp_path / names[taken])
    assert load_checkpoint(fresh, tmp_path) == names[taken]
    assert weights_sha256(fresh) == weights_sha256(trained)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_by_their_index(form, trained, fresh, tmp_path):
    base = "model" if form == "safetensors" else "pytorch_model"
    save = save_file if form == "safetensors" else torch.save
    weights = list(trained.state_dict().items())
    index = {}
    for number, part in enumerate((weights[:10], weights[10:])):
        name = f"{base}-0000{number}-of-00002.{form}"
        save(dict(part), tmp_path / name)
        index |= {key: name for key, _ in part}
    (tmp_path / f"{base}.{form}.index.json").write_text(json.dumps({"weight_map": index}))
    load_checkpoint(fresh, tmp_path)
    assert weights_sha256(fresh) == weights_sha256(trained)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=rf"lists {name}, which is not beside it"):
        load_checkpoint(fresh, tmp_path / f"{base}.{form}.index.json")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ([], "is a folder with no file of weights"),
        (["a.pth", "b.pth"], r"several files of weights: a\.pth, b\.pth\. Give the path"),
        (["model.safetensors", "model_1.safetensors"], "weights: model.safetensors, model_1.saf"),
        ([".metadata", "__0_0.distcp"], "is a sharded checkpoint of torch.distributed"),
    ],
)
def test_a_folder_of_none_or_several_is_refused_by_name(names, says, fresh, tmp_path):
    for name in names:
        (tmp_path / name).write_bytes(b"other")
    with pytest.raises(ConfigError, match=says):
        load_checkpoint(fresh, tmp_path)


@pytest.mark.parametrize("lies", [False, True])
def test_the_form_of_a_file_is_told_by_its_content(lies, trained, fresh, tmp_path):
    torch.save(trained.state_dict(), tmp_path / "a.safetensors")
    save_file(trained.state_dict(), tmp_path / "b.pth")
    load_checkpoint(fresh, tmp_path / ("a.safetensors" if lies else "b.pth"))
    assert weights_sha256(fresh) == weights_sha256(trained)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["best.pth", "log.txt"], r"is a zip archive \(best\.pth, log\.txt\), not a file of torch"),
        (["conv1.npy", "fc.npy"], "is an archive of NumPy arrays"),
        (["net/archive_format", "net/models/model.json"], r"is an archive of torch\.export"),
    ],
)
def test_an_archive_of_something_else_is_named(names, says, fresh, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    with pytest.raises(ConfigError, match=says):
        load_checkpoint(fresh, tmp_path / "a.pth")
