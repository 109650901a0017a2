"""Several students in one train file: settings of each student and settings that they share."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cache_service.config import suggest, validate_config
from cache_service.errors import ConfigError
from distill.config import TrainConfig, read_train_file
from distill.methods import requirements_of
from distill.students import ALONE, StudentState

OWN = (
    "student",
    "method",
    "optimizer",
    "schedule",
    "clip_grad_norm",
    "amp",
    "channels_last",
    "compile",
    "ema",
    "label_smoothing",
    "seed",
)
"""Keys of a train file that each student may set. All other keys define the shared stream, the
steps, and the intervals of evaluations and files."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Allowed names of students. They are also names of folders, so they must be valid on every
operating system."""


def load_students(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, TrainConfig]:
    """Load the train file at `path` and return the complete settings of each student, by name.

    Args:
        path: a file with the key `student` (one student) or `students` (several).
        overrides: settings such as `students.0.optimizer.lr=0.1`.

    Raises:
        ConfigError: a key is invalid. The message names the file, the student and each such key.
    """
    return split_students(read_train_file(path, overrides), where=str(path))


def split_students(document: Mapping[str, Any], *, where: str) -> dict[str, TrainConfig]:
    """Split a train file with `students` into complete settings of each student, by name.

    A key of a student replaces the whole value of the same key of the file; the two values are not
    merged. The `out` of a student is a subfolder of the file's `out` with the student's name. The
    only student of a file with `student` has an empty name.

    Raises:
        ConfigError: see `load_students`.
    """
    if "students" not in document:
        return {ALONE: validate_config(TrainConfig, document, where=where)}
    listed = document["students"]
    if not isinstance(listed, list) or not listed:
        raise ConfigError(f"{where}: students: a list of one student or more, got {listed!r}.")
    shared = {key: value for key, value in document.items() if key != "students"}
    found: dict[str, TrainConfig] = {}
    for place, entry in enumerate(listed):
        name = _name(entry, f"{where}: students.{place}")
        # Case-insensitive file systems would give both students the same folder.
        if name.lower() in {taken.lower() for taken in found}:
            raise ConfigError(f"{where}: students.{place}.name: {name} is taken.")
        own = {key: value for key, value in entry.items() if key != "name"}
        # The validation below refuses an `out` that is missing or is not a string.
        out = {"out": str(Path(shared["out"], name))} if isinstance(shared.get("out"), str) else {}
        found[name] = validate_config(
            TrainConfig, shared | own | out, where=f"{where}, student {name}"
        )
    return found


def _name(entry: Any, place: str) -> str:
    if not isinstance(entry, dict):
        raise ConfigError(
            f"{place}: a student is `name` and what it has of its own, got {entry!r}."
        )
    for key in entry.keys() - {"name", *OWN}:
        if key in TrainConfig.model_fields:
            raise ConfigError(
                f"{place}.{key}: is the same for all students.",
                hint=f"Write {key} once, beside `students`.",
            )
        raise ConfigError(f"{place}.{key}: unknown key, {suggest(str(key), ['name', *OWN])}.")
    name = entry.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"{place}.name: 1 to 64 letters, digits, `-` and `_`, the first a letter or a digit, "
            f"got {name!r}."
        )
    return name


def refuse_unlike(configs: Mapping[str, TrainConfig]) -> TrainConfig:
    """Refuse settings that cannot share one stream; return the first, for the shared settings.

    Raises:
        ConfigError: there are no students, they differ in a shared setting, or two of them have
            the same output folder.
    """
    if not configs:
        raise ConfigError("there are no students to train.")
    first, *others = configs
    for name in others:
        for key in TrainConfig.model_fields.keys() - {*OWN, "out"}:
            values = getattr(configs[first], key), getattr(configs[name], key)
            if values[0] != values[1]:
                raise ConfigError(
                    f"students {first} and {name} have one stream, but {key} is {values[0]} for "
                    f"the one and {values[1]} for the other."
                )
    # Resolved, because different spellings of a path may name the same folder.
    by_out = sorted((str(Path(config.out).resolve()), name) for name, config in configs.items())
    for (out, one), (other_out, other) in pairwise(by_out):
        if out == other_out:
            raise ConfigError(f"students {one} and {other} would write into the same folder {out}.")
    _refuse_equal_peers(configs)
    return configs[first]


def refuse_apart_peers(students: Sequence[StudentState]) -> None:
    """Refuse peers that have taken different numbers of steps.

    Raises:
        ConfigError: the steps differ. The message names two such students and their steps.
    """
    peers = [each for each in students if requirements_of(each.settings).peers]
    for one, other in pairwise(peers):
        if one.history.step != other.history.step:
            raise ConfigError(
                f"students {one.name} and {other.name} learn from each other, but one has taken "
                f"{one.history.step} steps and the other {other.history.step}.",
                hint="Choose another `out`, or move all their checkpoints elsewhere to start over.",
            )


def _refuse_equal_peers(configs: Mapping[str, TrainConfig]) -> None:
    """Refuse peers with equal settings: they start with equal weights and would stay equal."""
    known: dict[str, str] = {}
    for name, config in configs.items():
        if requirements_of(config.method).peers:
            settings = config.model_copy(update={"out": ""}).model_dump_json()
            if settings in known:
                raise ConfigError(
                    f"students {known[settings]} and {name} learn from each other, but are alike "
                    "in every setting: they would stay alike.",
                    hint="Give each of them a `seed` of its own.",
                )
            known[settings] = name
