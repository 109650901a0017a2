"""Checkpoints: whole or not at all, and never run as code."""

from __future__ import annotations

import errno
import io
import os
import pickle
import zipfile

import pytest
import torch

from cache_service.errors import ConfigError, CorruptError, OutOfSpaceError
from distill.checkpoint import load_checkpoint, refuse_other_config, save_checkpoints

PAYLOAD = {"model": {"weight": torch.arange(1000.0)}, "step": 3, "note": None}


def save_one(out, payload):
    save_checkpoints({"": str(out)}, {"": payload})


def test_what_is_saved_comes_back(tmp_path):
    save_one(tmp_path, PAYLOAD)
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        found = load_checkpoint(path)
        assert torch.equal(found["model"]["weight"], PAYLOAD["model"]["weight"])
        assert (found["step"], found["note"]) == (3, None)


def test_no_checkpoint_is_none(tmp_path):
    assert load_checkpoint(tmp_path) is None
    assert load_checkpoint(tmp_path / "nowhere" / "checkpoint.pt") is None


@pytest.mark.parametrize("fails", ["fsync", "rename"])
def test_a_write_that_fails_leaves_the_old_one_and_no_litter(tmp_path, monkeypatch, fails):
    save_one(tmp_path, PAYLOAD)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if fails == "fsync":
            patch.setattr(os, "fsync", full)
        else:
            patch.setattr("pathlib.Path.replace", full)
        with pytest.raises(OutOfSpaceError, match="no space left to write"):
            save_one(tmp_path, PAYLOAD | {"step": 4})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    save_one(tmp_path, PAYLOAD | {"step": 5})
    assert load_checkpoint(tmp_path)["step"] == 5


def test_a_full_disk_is_said_in_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutOfSpaceError, match="no space left to write"):
        save_one(tmp_path, PAYLOAD)


def test_the_file_is_replaced_in_one_rename(tmp_path, monkeypatch):
    save_one(tmp_path, PAYLOAD)
    steps = []
    fsync = os.fsync

    def spy(handle):
        steps.append(load_checkpoint(tmp_path)["step"])
        fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    save_one(tmp_path, PAYLOAD | {"step": 4})
    # Before the rename the file is the old one, and the new one is on disk already.
    assert steps[0] == 3
    assert steps[-1] == 4


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hostile-was-here",)


def damaged(content):
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 0x40
    return bytes(flipped)


def hostile(_content):
    buffer = io.BytesIO()
    torch.save({"format": 1, "model": Hostile()}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:-100],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"PK\x03\x04 but not really",
        lambda content: pickle.dumps({"format": 1, "model": Hostile()}),
        hostile,
    ],
    ids=["short", "half", "empty", "header", "pickle", "hostile"],
)
def test_a_file_that_is_no_checkpoint_is_refused_and_never_run(tmp_path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    save_one(tmp_path, PAYLOAD)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CorruptError, match=r"checkpoint\.pt is not a checkpoint of kd-cache"):
        load_checkpoint(path)
    assert not (tmp_path / "hostile-was-here").exists()


def test_a_flipped_bit_in_the_weights_is_refused(tmp_path):
    save_one(tmp_path, PAYLOAD)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(damaged(path.read_bytes()))
    with pytest.raises(CorruptError, match="is not a checkpoint of kd-cache, or is damaged"):
        load_checkpoint(path)


def test_no_flipped_bit_anywhere_changes_what_is_read(tmp_path):
    save_one(tmp_path, PAYLOAD)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    refused = 0
    for place in range(0, len(content), 13):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = load_checkpoint(path)
        except CorruptError:
            refused += 1
        else:  # in the padding between the archive's files
            assert torch.equal(found["model"]["weight"], PAYLOAD["model"]["weight"])
            assert (found["step"], found["note"], set(found)) == (3, None, {"format", *PAYLOAD})
    assert refused > len(content) / 13 / 2


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path):
    save_one(tmp_path, PAYLOAD)
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for file in stored.infolist():
            packed.writestr(file.filename, stored.read(file))
    with pytest.raises(CorruptError, match="is not a checkpoint of kd-cache, or is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("holds", [torch.zeros(3), {"weight": torch.zeros(3)}])
def test_somebody_elses_file_is_told_from_a_checkpoint(tmp_path, holds):
    torch.save(holds, tmp_path / "checkpoint.pt")
    with pytest.raises(CorruptError, match="it holds no run"):
        load_checkpoint(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    torch.save({"format": 2}, tmp_path / "checkpoint.pt")
    with pytest.raises(ConfigError, match="has format 2; this version of kd-cache reads 1"):
        load_checkpoint(tmp_path)


def test_every_field_that_differs_is_named_with_both_values(tmp_path):
    saved = {"config": {"a": 1, "b": {"c": [1, 2], "d": 5}, "out": "x", "gone": True}}
    wanted = {"a": 2, "b": {"c": [1, 3], "d": 5}, "out": "y", "new": None}
    with pytest.raises(ConfigError, match="is of a run with other settings") as refused:
        refuse_other_config(tmp_path / "checkpoint.pt", saved, wanted)
    said = str(refused.value)
    assert "a=1 there and 2 here; b.c=[1, 2] there and [1, 3] here; gone=true there" in said
    assert "b.d" not in said
    assert "out=" not in said
