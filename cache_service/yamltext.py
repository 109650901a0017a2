"""YAML text to plain values, by the core schema of YAML 1.2.

PyYAML implements 1.1, where `8:16` is the number 496, `1e-4` is text, `012` is 10, a date is no
text, and of a key given twice the second one counts: all without a word.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from cache_service.errors import ConfigError


def parse_yaml(text: str, *, where: str) -> Any:
    """The document in `text`.

    Raises:
        ConfigError: not YAML, or a key is there twice; says `where` and the line.
    """
    try:
        return yaml.load(text, Loader=_CoreLoader)  # noqa: S506 - built on SafeLoader
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = " ".join(part for part in (problem.context, problem.problem) if part)
        raise ConfigError(f"{where}{place}: not YAML: {said}.") from problem
    except (yaml.YAMLError, RecursionError) as problem:
        first_line = (str(problem).splitlines() or [""])[0]
        raise ConfigError(f"{where}: not YAML: {first_line}.") from problem


class _CoreLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without double keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key given twice: the first one would be lost without a word."""
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key_node, _ in node.value:
                if isinstance(key_node, yaml.ScalarNode):
                    if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                        raise yaml.constructor.ConstructorError(
                            None,
                            None,
                            f"key {key_node.value!r} is there twice",
                            key_node.start_mark,
                        )
                    seen.add(key_node.value)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


def _construct_int(loader: yaml.SafeLoader, node: Any) -> int:
    return int(loader.construct_scalar(node))


def _construct_float(loader: yaml.SafeLoader, node: Any) -> float:
    text = str(loader.construct_scalar(node)).lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_SCALARS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)
for _name, _pattern, _first in _SCALARS:
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), _first
    )
_CoreLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_CoreLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)
