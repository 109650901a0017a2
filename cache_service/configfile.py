"""A YAML file and `--set a.b=value` in, one validated frozen model out.

Every mistake becomes a one-line ConfigError that says where: the file, the line where YAML stops
making sense, or each bad key with what was found there.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from cache_service.errors import ConfigError
from cache_service.yamltext import parse_yaml

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_REPORTED = 8
"""Bad keys told at a time: one line must stay readable."""


def load_yaml_config(
    model_class: type[ModelT], path: str | Path, overrides: Sequence[str] = ()
) -> ModelT:
    """Read a config file, apply overrides, validate.

    Args:
        model_class: the frozen model that the file must fit.
        path: the YAML file.
        overrides: `a.b=value` each, value in YAML; list items by number, as in `caches.0=other`.

    Raises:
        ConfigError: no such file, not YAML, or not what the model allows.
    """
    return validate_config(model_class, read_document(path, overrides), where=str(path))


def read_document(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A config file with its overrides applied, before it is validated; see `load_yaml_config`."""
    return override_document(read_yaml(path), overrides)


def override_document(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The document itself, with `a.b=value` applied to it one after the other."""
    for override in overrides:
        _apply(document, override)
    return document


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: no such file, not text, not YAML, or not a mapping.
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
        raise ConfigError(f"config file {path} holds {found}, not `key: value` lines.")
    return document


def validate_config(model_class: type[ModelT], document: Any, *, where: str) -> ModelT:
    """The document as a model.

    Raises:
        ConfigError: one line that lists each bad key as `a.b: message`.
    """
    try:
        return model_class.model_validate(document)
    except ValidationError as refused:
        problems = [_problem(model_class, document, error) for error in _causes(refused)]
        rest = len(problems) - MAX_REPORTED
        more = f"; and {rest} more" if rest > 0 else ""
        said = f"{'; '.join(problems[:MAX_REPORTED])}{more}"
        raise ConfigError(f"{where}: {said}{'' if said.endswith('?') else '.'}") from refused


def _causes(refused: ValidationError) -> list[Any]:
    """The errors, without those that only follow: a list counts as short by its bad items."""
    errors: list[Any] = refused.errors()
    return [
        error
        for error in errors
        if error["type"] != "too_short"
        or all(other["loc"][:-1] != error["loc"] for other in errors)
    ]


def _problem(model_class: type[BaseModel], document: Any, error: Any) -> str:
    """`a.b: message` of one pydantic error."""
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
    if kind == "value_error":  # a validator of ours, which says what it found
        return f"{key}: {message}" if key else message
    return f"{key}: {message}, got {_shown(error['input'])}"


def suggest(key: str, known: Sequence[str]) -> str:
    """What may have been meant by a key that is not known, or all that are."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]}?"
    return f"known here: {', '.join(known)}" if known else "no keys are known here"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _without_tags(document: Any, location: tuple[Any, ...]) -> Iterator[Any]:
    """The location as the user wrote it.

    Inside a choice such as `method: {name: kd, ...}` pydantic puts the choice's tag, `kd`, into
    the location: a part that is no key of the document here, but the value of one.
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
    """Keys that were allowed where the location's last part stands."""
    models = [model_class]
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        fields = [model.model_fields[part] for model in models if part in model.model_fields]
        if fields:
            models = [m for f in fields for m in _models_in(f.annotation)]
        else:  # a tag: of the choices that are open, the one that carries it
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
    """Set one `a.b=value` in place; mappings on the way are made where there are none."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r} is not of the form a.b=value.")
    here: Any = document
    for depth, part in enumerate(parts[:-1]):
        above = ".".join(parts[:depth])
        if isinstance(here, dict) and here.get(part) is None:
            here[part] = {}
        here = here[_place(here, part, above, override)]
    here[_place(here, parts[-1], ".".join(parts[:-1]), override)] = parse_yaml(
        text, where=f"--set {key}"
    )


def _place(here: Any, part: str, above: str, override: str) -> str | int:
    """`part` as a key or an index of `here`."""
    if isinstance(here, dict):
        return part
    if isinstance(here, list):
        if part.isdecimal() and int(part) < len(here):
            return int(part)
        raise ConfigError(
            f"--set {override!r}: {above} is a list of {len(here)}; {part!r} is no place in it."
        )
    raise ConfigError(
        f"--set {override!r}: {above} is {_shown(here)}, which has no keys; set {above} as a whole."
    )
