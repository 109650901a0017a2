"""Configuration: YAML text and `--set a.b=value` become one validated, frozen pydantic model.

Every mistake becomes a one-line ConfigError that says where it is: the file, the line at which YAML
parsing failed, or each invalid key with the value that was found there.
"""

from __future__ import annotations

import difflib
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, ValidationInfo

from cache_service.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_REPORTED = 8
"""Invalid keys listed in one message, so that the line stays readable."""


class Frozen(BaseModel):
    """The base of every model in a file, a request or a cache: immutable, unknown keys refused.

    Numbers are finite: JSON has no NaN, and a fingerprint over one would never equal another.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


_AS_WRITTEN = "as written"
"""Validation context of text by the user of this machine. Requests to the service, and documents
that caches and checkpoints store, have none: their paths are taken literally."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_VARIABLE = re.compile(r"\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([^}]*)\})")


def expand_path(value: Any, info: ValidationInfo) -> Any:
    """Expands a leading `~` and every `$NAME` or `${NAME}` of a path in a config file.

    URLs, values that are not text, and documents that no user wrote are returned unchanged. What a
    variable contains is not expanded again.

    Raises:
        ValueError: a variable is not set, or there is no such user.
    """
    if info.context != _AS_WRITTEN or not isinstance(value, str) or _URL.match(value):
        return value
    user, slash, rest = value.partition("/")
    if not user.startswith("~"):
        return _VARIABLE.sub(lambda found: _variable(found, value), value)
    try:
        home = str(Path(user).expanduser())
    except RuntimeError as problem:
        raise ValueError(
            f"no home folder is known for {user} in {value!r}; write the whole path"
        ) from problem
    return home + slash + _VARIABLE.sub(lambda found: _variable(found, value), rest)


def _variable(found: re.Match[str], path: str) -> str:
    name = found[1] or found[2] or ""
    content = os.environ.get(name)
    if content is None:
        raise ValueError(
            f"the environment variable {name!r} in {path!r} is not set; set it, or write the whole "
            "path"
        )
    return content


EXPANDED = BeforeValidator(expand_path)
"""Annotation of every key that holds a path: `Annotated[str, Field(...), EXPANDED]`."""


def parse_yaml(text: str, *, where: str) -> Any:
    """Parses one YAML 1.2 document into plain values.

    Unlike the usual safe loaders, it keeps a date as text and refuses a repeated key.

    Args:
        text: the document.
        where: its name in messages.

    Raises:
        ConfigError: not YAML; names `where` and the line.
    """
    # Imported here: services and readers of rows never parse YAML, and ruamel takes 50 ms.
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.constructor.add_constructor("tag:yaml.org,2002:timestamp", _construct_text)
    try:
        return yaml.load(text)
    except MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        place = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        description = " ".join(part for part in (problem.context, problem.problem) if part)
        raise ConfigError(f"{where}{place}: not YAML: {description}.") from problem
    except (YAMLError, RecursionError, ValueError) as problem:
        first_line = (str(problem).splitlines() or [""])[0]
        raise ConfigError(f"{where}: not YAML: {first_line}.") from problem


def dump_yaml(document: dict[str, Any], *, width: int = 100) -> str:
    """Formats a mapping as YAML 1.2: one key a line, innermost lists and mappings in one line."""
    from ruamel.yaml import YAML

    text = io.StringIO()
    for key, value in document.items():
        yaml: Any = YAML(typ="safe", pure=True)  # its attributes are annotated as None
        yaml.sort_base_mapping_type_on_output = False
        yaml.width = width
        # None: collections without collections inside use flow style. That includes a mapping of
        # one scalar, which has to stay `key: value` at the top level.
        yaml.default_flow_style = None if isinstance(value, list | tuple | dict) else False
        yaml.dump({key: value}, text)
    return text.getvalue()


def _construct_text(_constructor: Any, node: Any) -> str:
    return str(node.value)


def load_yaml_config(
    model_class: type[ModelT], path: str | Path, overrides: Sequence[str] = ()
) -> ModelT:
    """Reads a config file, applies overrides and validates the result.

    Args:
        model_class: the model that the file must satisfy.
        path: the YAML file.
        overrides: `a.b=value` each, with the value in YAML; list items by index (`caches.0=other`).

    Raises:
        ConfigError: the file does not exist, is not YAML, or does not satisfy the model.
    """
    return validate_config(model_class, read_document(path, overrides), where=str(path))


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a config file and applies overrides, without validation; see `load_yaml_config`."""
    return override_document(read_yaml(path), overrides)


def override_document(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Applies `a.b=value` overrides to the document in place, in order, and returns it."""
    for override in overrides:
        _apply(document, override)
    return document


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file.

    Raises:
        ConfigError: the file does not exist, or is not text, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"cannot read config file {path}: {problem.strerror}.") from problem
    except UnicodeDecodeError as problem:
        raise ConfigError(f"config file {path} is not UTF-8 text.") from problem
    document = parse_yaml(text, where=str(path))
    if not isinstance(document, dict):
        found = "nothing" if document is None else f"a {type(document).__name__}"
        raise ConfigError(f"config file {path} contains {found} instead of `key: value` lines.")
    return document


def validate_config(model_class: type[ModelT], document: Any, *, where: str) -> ModelT:
    """Validates the document of a user, and expands `~` and `$NAME` in its paths.

    Raises:
        ConfigError: one line that lists each invalid key as `a.b: message`.
    """
    try:
        return model_class.model_validate(document, context=_AS_WRITTEN)
    except ValidationError as refused:
        problems = [_problem(model_class, document, error) for error in _root_errors(refused)]
        rest = len(problems) - MAX_REPORTED
        more = f"; and {rest} more" if rest > 0 else ""
        listed = f"{'; '.join(problems[:MAX_REPORTED])}{more}"
        raise ConfigError(f"{where}: {listed}{'' if listed.endswith('?') else '.'}") from refused


def _root_errors(refused: ValidationError) -> list[Any]:
    """The errors, except "list too short" where it only follows from an invalid list item."""
    errors: list[Any] = refused.errors()
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or all(other["loc"][:-1] != error["loc"] for other in errors)
    ]


def _problem(model_class: type[BaseModel], document: Any, error: Any) -> str:
    """Formats one pydantic error as `a.b: message`."""
    location = tuple(error["loc"])
    key = ".".join(str(part) for part in _without_tags(document, location))
    kind = error["type"]
    if kind == "extra_forbidden":
        known = sorted(set(_known_keys(model_class, location)))
        return f"{key}: unknown key, {suggest(str(location[-1]), known)}"
    if kind == "missing":
        return f"{key}: missing"
    if kind == "union_tag_not_found":
        return f"{key}.{error['ctx']['discriminator'].strip(chr(39))}: missing"
    message = str(error["msg"]).removeprefix("Value error, ").replace("\n", " ").rstrip(".")
    if kind == "value_error":  # from a validator of this project, whose message names the value
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {_shown(error['input'])}"


def suggest(key: str, known: Sequence[str]) -> str:
    """A suggestion for an unknown key: the most similar known key, or all known keys."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(known)}" if known else "no keys are known here"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _without_tags(document: Any, location: tuple[Any, ...]) -> Iterator[Any]:
    """The location in terms of the keys that the user wrote.

    In a tagged union such as `method: {name: kd, ...}` pydantic adds the tag, `kd`, to the
    location. The tag is not a key of the document but the value of one.
    """
    here = document
    for index, part in enumerate(location):
        if isinstance(here, dict):
            is_key = part in here or index == len(location) - 1
            if not is_key and part in [v for v in here.values() if isinstance(v, str)]:
                continue
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        yield part


def _known_keys(model_class: type[BaseModel], location: tuple[Any, ...]) -> Iterator[str]:
    """Keys that are allowed at the position of the location's last part."""
    models = [model_class]
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [m for f in fields for m in _models_in(f.annotation)]
        else:  # a tag: continue with the member of the union that has it
            models = [
                model
                for model in models
                if any(field.default == part for field in model.model_fields.values())
            ]
    for model in models:
        yield from model.model_fields


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _models_in(part)


def _apply(document: dict[str, Any], override: str) -> None:
    """Applies one `a.b=value` in place; missing mappings on the way are created."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r} is not of the form a.b=value.")
    here: Any = document
    for depth, part in enumerate(parts[:-1]):
        above = ".".join(parts[:depth])
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[_index(here, part, above, override)]
    here[_index(here, parts[-1], ".".join(parts[:-1]), override)] = parse_yaml(
        text, where=f"--set {key}"
    )


def _index(here: Any, part: str, above: str, override: str) -> str | int:
    """Converts `part` to a key or an index of `here`."""
    if isinstance(here, dict):
        return part
    if isinstance(here, list):
        if part.isdecimal() and int(part) < len(here):
            return int(part)
        raise ConfigError(
            f"--set {override!r}: {above} is a list of {len(here)}; {part!r} is not an index of it."
        )
    raise ConfigError(
        f"--set {override!r}: {above} is {_shown(here)}, which has no keys. Set {above} as a whole."
    )
