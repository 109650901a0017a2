"""Writes and reads `checkpoint.pt`, which holds everything that a run needs to resume.

A checkpoint is replaced atomically and fsynced. It is read with `weights_only=True`, so a
checkpoint from an untrusted source cannot run code. It holds no state of random generators,
because each step seeds its generators from the seed of the run and the number of the step.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cache_service.errors import ConfigError, CorruptError, SpecMismatchError, StorageError
from cache_service.storage.local import LocalStorage

CHECKPOINT_NAME = "checkpoint.pt"

NEXT_NAME = "checkpoint.next.pt"
"""Temporary name of a new checkpoint, until the checkpoints of all students are written."""

START_OVER = "Choose another `out`, or move the checkpoint elsewhere to start over."
"""Hint of errors. No hint advises to delete a checkpoint, which may hold days of training."""

EXPECTED_FILES = "Name a run's folder, its checkpoint.pt or its student.safetensors."
"""Hint of errors about a path that is not a checkpoint."""

FORMAT = 1
"""Increase this number if older versions would misread new checkpoints."""

FREE = {
    "out",
    "device",
    "loader",
    "workers",
    "evaluate",
    "checkpoint_every",
    "log_every",
    "tensorboard",
    "wandb",
    "replay",
    # These paths may change. The contents behind them are compared by `refuse_other_rows`.
    "dataset",
    "caches",
    "augment",
    "seeds",
}
"""Settings that a resumed run may change, because they do not change its losses."""

_UNREADABLE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError, MemoryError)
"""Exceptions of zipfile and torch for damaged files and for files of other programs."""

Payload = dict[str, Any]


def save_checkpoints(outs: Mapping[str, str], payloads: Mapping[str, Payload]) -> None:
    """Replace the checkpoints of several students atomically.

    The new checkpoints of all students but the last are written next to the old ones. Writing that
    of the last student commits all of them, and then the others are renamed. If the run is killed
    before the commit, all old checkpoints are valid. If it is killed after the commit,
    `load_checkpoints` renames the remaining files.

    Args:
        outs: folder of each student, by name. It must not be empty.
        payloads: contents of the checkpoints, by name.

    Raises:
        OutOfSpaceError, StorageError: a file cannot be written. The old checkpoints stay valid.
    """
    *others, last = outs
    for name in others:
        # `load_checkpoints` accepts this file only if the checkpoint of `last` has the same step.
        _put(outs[name], NEXT_NAME, {**payloads[name], "decided_by": last})
    _put(outs[last], CHECKPOINT_NAME, payloads[last])
    for name in others:
        _promote(outs[name])


def load_checkpoints(outs: Mapping[str, str]) -> dict[str, Payload]:
    """Load the checkpoints of several students to the CPU; students without one are left out.

    Raises:
        CorruptError, ConfigError: see `load_checkpoint`.
    """
    found = {name: load_checkpoint(out) for name, out in outs.items()}
    for name, out in outs.items():
        pending = load_checkpoint(Path(out) / NEXT_NAME)
        if pending is None:
            continue
        decision = found.get(pending["decided_by"])
        if decision is not None and _step(decision) == _step(pending):
            found[name] = pending
            _promote(out)
        else:  # the run was killed before the commit
            LocalStorage(out).delete(NEXT_NAME)
    return {name: payload for name, payload in found.items() if payload is not None}


def find_checkpoints(path: str | Path) -> dict[str, Path]:
    """Find the checkpoints at `path`, by the names of their students.

    A file or the folder of one student holds one checkpoint, whose name is empty. The folder of a
    run of several students has a subfolder for each of them, which is named after the student.
    """
    path = Path(path)
    if path.is_dir() and not (path / CHECKPOINT_NAME).is_file():
        below = {file.parent.name: file for file in sorted(path.glob(f"*/{CHECKPOINT_NAME}"))}
        if below:
            return below
    return {"": path}


def _step(payload: Payload) -> int:
    return int(payload["history"]["step"])


def _put(out: str, name: str, payload: Payload) -> None:
    content = io.BytesIO()
    torch.save({"format": FORMAT, **payload}, content)
    storage = LocalStorage(out)
    storage.put(name, content.getvalue())
    storage.sweep()


def _promote(out: str) -> None:
    # No fsync is needed: if the rename is lost in a crash, `load_checkpoints` repeats it.
    try:
        (Path(out) / NEXT_NAME).replace(Path(out) / CHECKPOINT_NAME)
    except OSError as problem:
        raise StorageError(
            f"cannot write {out}/{CHECKPOINT_NAME}: {problem.strerror}."
        ) from problem


def load_checkpoint(path: str | Path) -> Payload | None:
    """Load the checkpoint at `path`, a file or the folder of a run, to the CPU.

    Returns None if there is no such file.

    Raises:
        CorruptError: the file is not a checkpoint or is damaged.
        ConfigError: it has a newer format.
    """
    path = Path(path)
    if path.is_dir():
        path /= CHECKPOINT_NAME
    content = LocalStorage(str(path.parent)).get(path.name)
    if content is None:
        return None
    try:
        payload = _unpack(content)
    except (*_UNREADABLE, pickle.UnpicklingError, zipfile.BadZipFile, struct.error) as problem:
        raise CorruptError(
            f"{path} is not a checkpoint of kd-cache, or is damaged.",
            hint=START_OVER if path.name == CHECKPOINT_NAME else EXPECTED_FILES,
        ) from problem
    if not isinstance(payload, dict) or "format" not in payload:
        raise CorruptError(
            f"{path} is no checkpoint of kd-cache: it holds no run.", hint=EXPECTED_FILES
        )
    if payload["format"] != FORMAT:
        raise ConfigError(
            f"{path} has format {payload['format']}; this version of kd-cache reads {FORMAT}."
        )
    return payload


def _unpack(content: bytes) -> Any:
    # torch.load does not verify checksums, so a flipped bit would change a weight unnoticed. The
    # zip archive has a CRC-32 of each file. Torch never compresses, so any other
    # compression type also indicates damage.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        plain = all(file.compress_type == zipfile.ZIP_STORED for file in archive.infolist())
        if not plain or archive.testzip() is not None:
            raise zipfile.BadZipFile
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def refuse_other_config(path: Path, saved: Payload, wanted: dict[str, Any]) -> None:
    """Refuse to resume a run under settings that would change its losses.

    Args:
        path: path of the checkpoint, for the message.
        saved: contents of the checkpoint.
        wanted: config of this run, as a JSON document.

    Raises:
        ConfigError: a field differs. The message names every such field with both values.
    """
    before, now = _leaves(saved["config"]), _leaves(wanted)
    differing = [
        f"{key}={_json(before.get(key))} there and {_json(now.get(key))} here"
        for key in sorted(before.keys() | now.keys())
        # FREE lists top-level keys, so nested keys are compared by their first part.
        if key.partition(".")[0] not in FREE and before.get(key) != now.get(key)
    ]
    if differing:
        raise ConfigError(
            f"{path} is of a run with other settings: {'; '.join(differing)}.",
            hint=START_OVER,
        )


def refuse_other_rows(path: Path, saved: Payload, identity: dict[str, Any]) -> None:
    """Refuse to resume a run on other rows or views.

    Raises:
        SpecMismatchError: the rows or views differ. The message names the difference.
    """
    for key, before in saved["identity"].items():
        now = identity.get(key)
        if before != now:
            raise SpecMismatchError(
                f"{path} is of a run on {key} {_json(before)}, but this run has {_json(now)}.",
                hint=START_OVER,
            )


def _leaves(document: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(document, dict):
        return {prefix: document}
    found: dict[str, Any] = {}
    for key, value in document.items():
        found |= _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
