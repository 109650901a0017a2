"""Config models to Markdown: every key with its type, its bounds, its default and its meaning."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cache_service.api.http.settings import ServeConfig
from cache_service.datasets import DatasetConfig
from cache_service.format.recipe import PRESETS, AugmentConfig, Op
from cache_service.recording.build_config import BuildConfig
from cache_service.teacher.settings import TeacherConfig
from cli.experiments.cycle import CycleConfig
from cli.experiments.experiment_file import ExperimentConfig, VariantConfig
from distill.checkpoint import FREE
from distill.config import TrainConfig
from distill.methods import METHODS
from distill.methods.published import published_of
from distill.methods.setting_types import Schedule
from distill.multi_student import OWN

WORDS: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    dict: "mapping",
}
LISTED_ELSEWHERE = {
    "method": "one of the [methods](methods.md)",
    "ops": "list of [ops](augmentation.md#ops)",
}
SEEDS = "seeds: `0:30` (0 to 29), `7`, or a list of those"
MANY = 4
"""Keys of a section above which its defaults are told in its own table only."""

CHOOSES = ("kind", "name", "op")
"""Keys that say which form of a section is meant."""


def build_file() -> str:
    """Tables of a build file."""
    return "\n\n".join(_sections(BuildConfig, "", seen=set()))


def train_file() -> str:
    """Tables of a train file; sections that a build file has too are there."""
    return "\n\n".join(_sections(TrainConfig, "", seen={DatasetConfig, AugmentConfig}))


def cycle_file() -> str:
    """Table of a cycle file, whose parts are those of build and train files."""
    return _table(CycleConfig, "")


def experiment_file() -> str:
    """Tables of an experiment file, whose parts are those of build and train files."""
    return f"{_table(ExperimentConfig, '')}\n\n### `methods.NAME`\n\n{_table(VariantConfig, '')}"


def serve_file() -> str:
    """Tables of the file of `kd-cache serve`; sections that a build file has too are there."""
    return "\n\n".join(_sections(ServeConfig, "", seen={DatasetConfig, TeacherConfig}))


def free_keys() -> str:
    """Keys of a train file that a resumed run may change."""
    return ", ".join(f"`{name}`" for name in sorted(FREE))


def own_keys() -> str:
    """Keys of a train file that each of several students may have of its own."""
    return ", ".join(f"`{name}`" for name in OWN)


def ops() -> str:
    """Each op with its settings."""
    parts = []
    for model in _models(Op):
        name = model.model_fields["op"].default
        parts.append(f"### `{name}`\n\n{_sentence(model)}")
        if len(model.model_fields) > 1:
            parts.append(_table(model, ""))
    return "\n\n".join(parts)


def presets() -> str:
    """Each preset written out as the list of ops that it stands for."""
    parts = []
    for name, chain in PRESETS.items():
        listed = [op.model_dump(mode="json", exclude_defaults=True) for op in chain]
        lines = [_flow({"op": op.op, **changed}) for op, changed in zip(chain, listed, strict=True)]
        items = "\n".join(f"    - {line}" for line in lines)
        size = 32 if name == "cifar" else 224
        parts.append(f"`{name}`\n\n```yaml\naugment:\n  size: {size}\n  ops:\n{items}\n```")
    return "\n\n".join(parts)


def method_list() -> str:
    """One line a method."""
    rows = ["| method | loss |", "|---|---|"]
    for name, method in METHODS.items():
        formula = _sentence(method.settings).replace("|", "\\|")
        rows.append(f"| [`{name}`](docs/methods.md#{name}) | {formula} |")
    return "\n".join(rows)


def methods() -> str:
    """Each registered method: its formula and source as its code tells them, and its settings."""
    parts = []
    for name, method in METHODS.items():
        parts.append(f"## `{name}`\n\n{_prose(method.settings)}\n\n{_prose(method.terms)}")
        if len(method.settings.model_fields) > 1:
            parts.append(_table(method.settings, "method."))
        if published_of(name):
            parts.append(f"Published settings:\n\n{_published(name)}")
    return "\n\n".join(parts)


def _published(method: str) -> str:
    """The settings with which a method was published, as they are written in the files."""
    rows = ["| data and networks | train file | build file | source |", "|---|---|---|---|"]
    for row in published_of(method):
        written = {key: value for key, value in row.method.items() if value is not None}
        keys = [f"`method: {_flow(written)}`"]
        keys += [f"`{key}: {_flow(value)}`" for key, value in row.train.items()]
        build = ", ".join(f"`{key}: {_flow(value)}`" for key, value in row.build.items())
        source = f"{row.source}. {row.note}" if row.note else row.source
        cells = (row.data, ", ".join(keys), build, source)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _sections(model: type[BaseModel], prefix: str, seen: set[type[BaseModel]]) -> Iterator[str]:
    """The table of a model, then those of the models in it, each once."""
    seen.add(model)
    yield _table(model, prefix)
    for name, field in model.model_fields.items():
        inner = [] if name in LISTED_ELSEWHERE else [*_models(field.annotation)]
        for each in inner:
            if each in seen:
                continue
            key = f"{prefix}{name}"
            yield f"### `{_written(key, each)}`\n\n{_sentence(each)}"
            yield from _sections(each, f"{key}.", seen)


def _written(key: str, model: type[BaseModel]) -> str:
    """`codec: {kind: topk}` where there is a choice, else the key alone."""
    for name in CHOOSES:
        field = model.model_fields.get(name)
        if field is not None and get_origin(field.annotation) is Literal:
            return f"{key}: {{{name}: {field.default}}}"
    return key


def _table(model: type[BaseModel], prefix: str) -> str:
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if name in CHOOSES and get_origin(field.annotation) is Literal:
            continue
        meaning = field.description or _meaning_of_section(field)
        cells = (f"`{prefix}{name}`", _type(name, field), _default(field), meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) if len(rows) > 2 else "No settings."


def _meaning_of_section(field: FieldInfo) -> str:
    sections = [*_models(field.annotation)]
    if len(sections) > 1:
        return "One of the forms below."
    return _sentence(sections[0]) if sections else ""


def _type(name: str, field: FieldInfo) -> str:
    if name in LISTED_ELSEWHERE:
        return LISTED_ELSEWHERE[name]
    if name == "seeds":
        return SEEDS
    bounds = ", ".join(_bounds(field.annotation, field.metadata))
    return _kind(field.annotation) + (f", {bounds}" if bounds else "")


def _kind(annotation: Any) -> str:
    """A type in the words of a YAML file."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(parts[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        options = [_kind(part) for part in parts if part is not type(None)]
        return " or ".join(dict.fromkeys(options))
    if origin is tuple:
        count = "" if parts[-1] is Ellipsis else f"{len(parts)} "
        kind = _kind(parts[0])
        return f"list of {count}{kind}" + ("" if kind.endswith("`") else "s")
    return _plain_kind(origin or annotation)


def _plain_kind(found: Any) -> str:
    if found is Schedule:
        return "[schedule](#schedules)"
    if isinstance(found, type) and issubclass(found, BaseModel):
        return "section"
    return WORDS[found]


def _bounds(annotation: Any, metadata: list[Any]) -> Iterator[str]:
    """What a value must be, of the field and of its parts, each once."""
    found = dict.fromkeys(
        sign + _limit(limit)
        for each in _metadata(annotation, metadata)
        for kind, name, sign in (
            (Ge, "ge", ">= "),
            (Gt, "gt", "> "),
            (Le, "le", "<= "),
            (Lt, "lt", "< "),
        )
        if isinstance(each, kind)
        for limit in [getattr(each, name)]
    )
    yield from found


def _limit(limit: float) -> str:
    if isinstance(limit, int) and limit >= 2**20 and limit & (limit - 1) == 0:
        return f"2**{limit.bit_length() - 1}"
    return f"{limit:g}" if isinstance(limit, float) else str(limit)


def _metadata(annotation: Any, metadata: list[Any]) -> Iterator[Any]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else [each]
    for part in get_args(annotation):
        if get_origin(part) is Annotated:
            yield from _metadata(get_args(part)[0], list(get_args(part)[1:]))
        elif part is not MinLen:
            yield from _metadata(part, [])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        if len(type(value).model_fields) > MANY and value == type(value)():
            return "its own"
        chosen = {name: getattr(value, name) for name in CHOOSES if hasattr(value, name)}
        value = chosen or value.model_dump(mode="json", exclude_none=True)
    if isinstance(value, tuple):
        value = list(value)
    return f"`{_flow(value)}`"


def _flow(value: Any) -> str:
    """A value as it is written on one line of YAML, numbers to four places."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(part) for part in value) + "]"
    if isinstance(value, float) and not isinstance(value, bool):
        return f"{value:.4g}"
    text: str = yaml.safe_dump(value, default_flow_style=True)
    return text.removesuffix("...\n").strip()


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The config models inside an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _models(part)


def _sentence(model: type[BaseModel]) -> str:
    """The first paragraph of a model's docstring."""
    return _prose(model).partition("\n\n")[0]


def _prose(documented: Any) -> str:
    """A docstring as Markdown: paragraphs on one line each, `*` in formulas kept."""
    text = inspect.getdoc(documented) or ""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n")]
    return "\n\n".join(_escaped(part) for part in paragraphs)


def _escaped(paragraph: str) -> str:
    pieces = paragraph.split("`")
    for index in range(0, len(pieces), 2):  # outside of code
        pieces[index] = pieces[index].replace("*", "\\*")
    return "`".join(pieces)
