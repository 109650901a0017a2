"""Which outputs of a teacher are the dataset's classes, where it has more: `teacher.classes`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cache_service.errors import ConfigError
from cache_service.teacher.settings import ClassNames, TeacherConfig

MAX_SHOWN = 3
"""Names that a message shows."""


def choose_outputs(
    config: TeacherConfig, *, class_names: Sequence[str], num_classes: int
) -> tuple[int, ...] | None:
    """The output of each class of the dataset, in their order; None if the file does not choose.

    Args:
        config: `teacher:` of a build file.
        class_names: of the dataset, by label; empty if it has none.
        num_classes: of the dataset.

    Raises:
        ConfigError: an output is missing, or stands for two classes.
    """
    chosen = config.classes
    if chosen is None:
        return None
    if isinstance(chosen, ClassNames):
        outputs = _by_name(chosen, class_names)
    elif isinstance(chosen, str):
        outputs = tuple(_index(line, chosen) for line in _lines(chosen))
    else:
        outputs = chosen
    if len(outputs) != num_classes:
        raise ConfigError(
            f"teacher.classes names {len(outputs)} outputs, and the dataset has {num_classes} "
            "classes.",
            hint="Name one output for each class, in the order of the dataset's classes.",
        )
    for output in outputs:
        if outputs.count(output) > 1:
            first, second = [label for label, each in enumerate(outputs) if each == output][:2]
            raise ConfigError(
                f"teacher.classes names output {output} twice, for "
                f"{_shown(first, class_names)} and {_shown(second, class_names)}.",
                hint="Each class needs an output of its own.",
            )
    return outputs


def require_outputs(outputs: Sequence[int], *, who: str, num_outputs: int) -> None:
    """Refuse a choice beyond the teacher's outputs.

    Raises:
        ConfigError: names the output.
    """
    if max(outputs) >= num_outputs:
        raise ConfigError(
            f"teacher.classes names output {max(outputs)}, and {who} has outputs 0 to "
            f"{num_outputs - 1}.",
            hint="Count outputs from 0, and check teacher.num_classes.",
        )


def _by_name(chosen: ClassNames, class_names: Sequence[str]) -> tuple[int, ...]:
    if not class_names:
        raise ConfigError(
            "teacher.classes goes by names, and the classes of the dataset have none.",
            hint="List the indices of the outputs: teacher.classes: [4, 1, 3].",
        )
    found = [_matched(chosen.pattern, name) for name in class_names]
    unmatched = [name for name, part in zip(class_names, found, strict=True) if part is None]
    if unmatched:
        raise ConfigError(
            f"teacher.classes.pattern {chosen.pattern!r} does not match {_first(unmatched)} of the "
            "dataset.",
            hint='Write a pattern of the class names, such as "{index}_*" for 0_n01440764.',
        )
    parts = [part for part in found if part is not None]
    if chosen.names is None:
        return tuple(int(part) for part in parts)
    names = _output_names(chosen.names)
    unknown = [part for part in parts if part not in names]
    if unknown:
        raise ConfigError(
            f"teacher.classes.names has {len(names)} names, and {_first(unknown)} of the dataset "
            f"is not among them (they begin with {_first(list(names))}).",
            hint="Name all outputs of the teacher in their order, and what they are called in the "
            'dataset by teacher.classes.pattern, such as "*_{name}".',
        )
    return tuple(names[part] for part in parts)


def _matched(pattern: str, name: str) -> str | None:
    """What stands for {index} or {name} in a class name; None if the pattern does not match."""
    parts = re.split(r"(\{index\}|\{name\}|\*)", pattern)
    forms = {"{index}": r"(\d+)", "{name}": "(.+)", "*": ".*"}
    found = re.fullmatch("".join(forms.get(part, re.escape(part)) for part in parts), name)
    return found[1] if found else None


def _output_names(names: str | tuple[str, ...]) -> dict[str, int]:
    """Outputs by name, from a list, a file or one of timm's lists of ImageNet's classes.

    Lines such as `n01440764 tench, Tinca tinca` count by their first word, too.
    """
    if not isinstance(names, str):
        return {name: index for index, name in enumerate(names)}
    lines = _lines(names) if Path(names).is_file() else _imagenet_names(names)
    return {
        **{line.split()[0]: index for index, line in enumerate(lines)},
        **{line: index for index, line in enumerate(lines)},
    }


def _imagenet_names(subset: str) -> list[str]:
    from timm.data.imagenet_info import ImageNetInfo

    try:
        return list(ImageNetInfo(subset).label_names())  # type: ignore[no-untyped-call]  # timm's
    except AssertionError as error:
        raise ConfigError(
            f"teacher.classes.names: there is no file {subset}, and timm knows no ImageNet of this "
            "name.",
            hint="Name a file with one name a line, list the names, or write imagenet-1k.",
        ) from error


def _lines(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"teacher.classes: cannot read {path}: {getattr(error, 'strerror', 'not UTF-8 text')}.",
            hint="Name a text file with one output a line.",
        ) from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _index(line: str, path: str) -> int:
    if not line.isdecimal():
        raise ConfigError(
            f"teacher.classes: {path} has the line {line[:40]!r}, which is not the index of an "
            "output.",
            hint="Write one index a line; for names, set teacher.classes: {names: FILE}.",
        )
    return int(line)


def _first(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:MAX_SHOWN])
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return f"{shown}{more}"


def _shown(label: int, class_names: Sequence[str]) -> str:
    return repr(class_names[label]) if class_names else f"class {label}"
