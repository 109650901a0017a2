"""`checkpoint.pt`: everything that a run needs to resume as if it had not been interrupted.

Written whole or not at all, fsynced, and read back with `weights_only=True`, so that opening
somebody's checkpoint runs none of their code. Randomness is not in it: each step draws from a
generator seeded by the run's seed and its own number.
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
"""A student's next checkpoint, until those of all students of its run are written."""

START_OVER = "Choose another `out`, or move the checkpoint elsewhere to start over."
"""Hint. A checkpoint may be days of work, so no message advises to delete one."""

EXPECTED_FILES = "Name a run's folder, its checkpoint.pt or its student.safetensors."
"""Hint where a file was named that is not a checkpoint."""

FORMAT = 1
"""Raised when an older version would misread a newer checkpoint."""

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
    # Where rows and images lie may change; what they are is held by the identity.
    "dataset",
    "caches",
    "augment",
    "seeds",
}
"""Settings that a resumed run may change, because they do not change its losses."""

_UNREADABLE = (RuntimeError, EOFError, ValueError, LookupError, TypeError, OSError, MemoryError)
"""What zipfile and torch raise for damaged files and files of other programs."""

Payload = dict[str, Any]


def save_checkpoints(outs: Mapping[str, str], payloads: Mapping[str, Payload]) -> None:
    """Replace the checkpoints of several students, in effect all at once.

    All but the last student's are written beside the old ones. Writing the last student's commits
    them, and then the others are renamed. If the run is killed before that, all old ones are valid;
    if it is killed after, `load_checkpoints` renames the rest.

    Args:
        outs: folder of each student, by name; at least one.
        payloads: by name.

    Raises:
        OutOfSpaceError, StorageError: the old ones are still valid.
    """
    *others, last = outs
    for name in others:
        _put(outs[name], NEXT_NAME, {**payloads[name], "decided_by": last})
    _put(outs[last], CHECKPOINT_NAME, payloads[last])
    for name in others:
        _promote(outs[name])


def load_checkpoints(outs: Mapping[str, str]) -> dict[str, Payload]:
    """The checkpoints of several students, by name, of those that have one; on the CPU.

    Raises:
        CorruptError, ConfigError: as `load_checkpoint`.
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
        else:  # the run was killed before the last student's was written
            LocalStorage(out).delete(NEXT_NAME)
    return {name: payload for name, payload in found.items() if payload is not None}


def find_checkpoints(path: str | Path) -> dict[str, Path]:
    """Checkpoints at `path`, by the names of their students.

    A file, or the folder of one student, is its one checkpoint, and has no name; in the folder of a
    run of several, each student has a folder by its name.
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
    # Needs no fsync: a rename that is lost is made again by `load_checkpoints`.
    try:
        (Path(out) / NEXT_NAME).replace(Path(out) / CHECKPOINT_NAME)
    except OSError as problem:
        raise StorageError(
            f"cannot write {out}/{CHECKPOINT_NAME}: {problem.strerror}."
        ) from problem


def load_checkpoint(path: str | Path) -> Payload | None:
    """The checkpoint at `path` (a file, or a run's folder), on the CPU; None where there is none.

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
    # torch.load checks no checksum: a flipped bit would be a weight. The archive has one for each
    # of its files, which torch stores as they are.
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        plain = all(file.compress_type == zipfile.ZIP_STORED for file in archive.infolist())
        if not plain or archive.testzip() is not None:
            raise zipfile.BadZipFile
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def refuse_other_config(path: Path, saved: Payload, wanted: dict[str, Any]) -> None:
    """Refuse to resume a run under settings that would change its losses.

    Args:
        path: of the checkpoint, for the message.
        saved: the checkpoint.
        wanted: the config of this run, as JSON.

    Raises:
        ConfigError: names each field that differs, with both values.
    """
    before, now = _leaves(saved["config"]), _leaves(wanted)
    differing = [
        f"{key}={_json(before.get(key))} there and {_json(now.get(key))} here"
        for key in sorted(before.keys() | now.keys())
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
        SpecMismatchError: names what differs, with both values.
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
