"""An experiment file: recordings, students x methods x seeds, and the figures to compare with.

The file is expanded into ordinary train and build files, so everything that those may say can be
said here, and each run could also be started by `kd-cache train`. Nothing is trained here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from cache_service.config import (
    EXPANDED,
    Frozen,
    expand_path,
    override_document,
    parse_yaml,
    read_yaml,
    validate_config,
)
from cache_service.errors import ConfigError
from cache_service.recording.build_config import BuildConfig
from distill.config import TrainConfig
from distill.export import STUDENT_NAME

Document = dict[str, Any]
Figure = int | float
FigureKind = Literal["accuracy", "error rate", "errors"]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
"""Names are used as names of folders."""

TEACHER_KEYS = ("model", "model_args", "mean", "std")
"""Keys of a train file's `student` that describe the same network as a build file's `teacher`."""

SET_BY_EXPERIMENT = ("caches", "dataset", "evaluate", "method", "out", "seed", "seeds", "student")
"""Keys of a train file that an experiment works out for every run."""

FOLDERS = ("cache", "out", "root")
"""Keys that say where something is, not what it is."""


class VariantConfig(Frozen):
    """A method, who teaches in it, and what else its runs have of their own."""

    method: Annotated[Document, Field(description="`method:` of a train file.")]
    recordings: Annotated[
        tuple[Name, ...] | None, Field(description="Recordings that teach; null: all of them.")
    ] = None
    views: Annotated[
        Name | None,
        Field(description="Learn without a teacher, on the views of this recording."),
    ] = None
    students: Annotated[
        tuple[Name, ...] | None, Field(description="Students it trains; null: all of them.")
    ] = None
    train: Annotated[
        Document, Field(description="Keys of a train file that differ from the file's `train`.")
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> VariantConfig:
        if self.views is not None and self.recordings:
            raise ValueError("recordings and views: give one of them")
        return self


def _as_variant(value: Any) -> Any:
    """`{name: kd, alpha: 0.9}` is short for `{method: {name: kd, alpha: 0.9}}`."""
    if isinstance(value, dict) and "name" in value and "method" not in value:
        return {"method": value}
    return value


def _expand_folders(value: Any, info: ValidationInfo) -> Any:
    """Expands the path of a recording, or `cache` and `out` in the keys of a file."""
    if not isinstance(value, dict):
        return expand_path(value, info)
    expanded = dict(value)
    for key in value.keys() & FOLDERS:
        try:
            expanded[key] = expand_path(value[key], info)
        except ValueError as problem:
            raise ValueError(f"{key}: {problem}") from problem
    return expanded


class GoalConfig(Frozen):
    """A statement about the mean of a row that the experiment is to support."""

    text: Annotated[str, Field(min_length=1, description="The statement in words.")]
    row: Annotated[str, Field(description="The row it is about.")]
    at_least: Annotated[float | None, Field(description="Bound on the mean.")] = None
    at_most: Annotated[float | None, Field(description="Bound on the mean.")] = None
    better_than: Annotated[
        str | None, Field(description="Another row: fewer errors or a higher accuracy than it.")
    ] = None

    @model_validator(mode="after")
    def _check(self) -> GoalConfig:
        bounds = (self.at_least, self.at_most, self.better_than)
        if sum(bound is not None for bound in bounds) != 1:
            raise ValueError("give one of at_least, at_most and better_than")
        return self


class ExperimentConfig(Frozen):
    """An experiment file."""

    title: Annotated[str, Field(min_length=1, description="Heading of the results.")] = "Experiment"
    source: Annotated[
        str | None, Field(description="Where the published figures were published.")
    ] = None
    notes: Annotated[
        tuple[str, ...], Field(description="Paragraphs that stand below the table.")
    ] = ()
    out: Annotated[
        str, Field(min_length=1, description="Folder of everything written."), EXPANDED
    ] = "experiment-out"
    figure: Annotated[
        FigureKind,
        Field(description="What the table compares: top-1 accuracy, top-1 error rate, or errors."),
    ] = "accuracy"
    runs: Annotated[
        int, Field(ge=1, le=100, description="Runs of each variant; they have seeds 0, 1, ...")
    ] = 3
    dataset: Annotated[Document, Field(description="`dataset:` of train and build files.")]
    evaluate: Annotated[Document, Field(description="`evaluate:` of train files.")]
    augment: Annotated[
        Document | None, Field(description="`augment:` of teachers, and of what names none.")
    ] = None
    train: Annotated[
        Document, Field(description="Keys of a train file that all runs have in common.")
    ]
    teachers: Annotated[
        dict[Name, Annotated[Document, BeforeValidator(_expand_folders)]],
        Field(description="Networks to train first, on labels: keys of a train file, by name."),
    ] = Field(default_factory=dict)
    recordings: Annotated[
        dict[Name, Annotated[str | Document, BeforeValidator(_expand_folders)]],
        Field(
            description="Caches by name: a path or URL, or keys of a build file to record. Its "
            "`teacher` may be the name of a network in `teachers`."
        ),
    ] = Field(default_factory=dict)
    students: Annotated[
        dict[Name, Document],
        Field(min_length=1, description="`student:` of a train file, by name."),
    ]
    methods: Annotated[
        dict[Name, Annotated[VariantConfig, BeforeValidator(_as_variant)]],
        Field(
            min_length=1,
            description="`method:` of a train file by name, or a mapping with the keys below.",
        ),
    ]
    titles: Annotated[
        dict[str, str],
        Field(
            description="Names of rows in the table. A row is a teacher, METHOD, or "
            "STUDENT/METHOD where there are several students."
        ),
    ] = Field(default_factory=dict)
    published: Annotated[
        dict[str, Figure | tuple[Figure, Figure]],
        Field(description="Published figures by row; a list of two is a range."),
    ] = Field(default_factory=dict)
    goals: Annotated[
        tuple[GoalConfig, ...], Field(description="What the experiment is to show.")
    ] = ()
    quick: Annotated[
        Document | None, Field(description="Keys of this file that differ with `--quick`.")
    ] = None

    @field_validator("train")
    @classmethod
    def _check_train(cls, train: Document) -> Document:
        taken = sorted(train.keys() & set(SET_BY_EXPERIMENT))
        if taken:
            raise ValueError(f"{taken[0]} is set by the experiment for every run")
        return train

    @model_validator(mode="after")
    def _check(self) -> ExperimentConfig:
        for name, entry in self.methods.items():
            named = (*(entry.recordings or ()), *([entry.views] if entry.views else []))
            _refuse_unknown(f"methods.{name}: recording", named, self.recordings)
            _refuse_unknown(f"methods.{name}: student", entry.students or (), self.students)
            if entry.views is not None and isinstance(self.recordings[entry.views], str):
                raise ValueError(
                    f"methods.{name}: views of {entry.views}, which is not recorded by this file: "
                    "name it under recordings instead"
                )
        for name, recording in self.recordings.items():
            if isinstance(recording, dict) and isinstance(recording.get("teacher"), str):
                _refuse_unknown(
                    f"recordings.{name}: teacher", (recording["teacher"],), self.teachers
                )
        rows = [*self.teachers, *(variant.name for variant in self.variants())]
        if len(set(rows)) < len(rows):
            raise ValueError("a teacher and a method have the same name")
        for goal in self.goals:
            named = (goal.row, *([goal.better_than] if goal.better_than else []))
            _refuse_unknown("goals: row", named, rows)
        for key in ("titles", "published"):
            _refuse_unknown(f"{key}: row", getattr(self, key), rows)
        return self

    def variants(self) -> Iterator[Variant]:
        """Every student with every method that trains it, in the order of the file."""
        for student in self.students:
            for method, entry in self.methods.items():
                if entry.students is None or student in entry.students:
                    name = method if len(self.students) == 1 else f"{student}/{method}"
                    yield Variant(name, student, method, entry)

    def title_of(self, row: str) -> str:
        """The name of a row in the table."""
        return self.titles.get(row, row.replace("/", ", "))

    def teacher_config(self, name: str, *, where: str) -> TrainConfig:
        """The train file of a teacher.

        Raises:
            ConfigError: one line that lists each bad key.
        """
        document = self.teacher_document(name)
        return validate_config(TrainConfig, document, where=f"{where}: teacher {name}")

    def build_config(self, name: str, *, where: str) -> BuildConfig | None:
        """The build file of a recording; None of one that was recorded elsewhere.

        Raises:
            ConfigError: one line that lists each bad key.
        """
        if isinstance(self.recordings[name], str):
            return None
        document = self.build_document(name)
        return validate_config(BuildConfig, document, where=f"{where}: recording {name}")

    def train_config(self, variant: Variant, seed: int, *, where: str) -> TrainConfig:
        """The train file of one run.

        Raises:
            ConfigError: one line that lists each bad key.
        """
        document = self.train_document(variant, seed)
        return validate_config(TrainConfig, document, where=f"{where}: {variant.name}")

    def teacher_document(self, name: str) -> Document:
        """The train file of a teacher before it is validated."""
        document = {
            "dataset": self.dataset,
            "augment": self.augment,
            **self.train,
            "method": {"name": "ce"},
            "evaluate": self.evaluate,
            **self.teachers[name],
            "out": self.teacher_out(name),
        }
        return {key: value for key, value in document.items() if value is not None}

    def build_document(self, name: str) -> Document:
        """The build file of a recording of this file before it is validated."""
        recording = self.recordings[name]
        assert isinstance(recording, dict)
        document = {"cache": self.cache_of(name), **self._recorded(name)}
        document |= {key: value for key, value in recording.items() if value is not None}
        teacher = recording.get("teacher")
        if isinstance(teacher, str):
            network = self.teachers[teacher].get("student", {})
            document["teacher"] = {key: network[key] for key in TEACHER_KEYS if key in network}
            document["teacher"]["checkpoint"] = str(Path(self.teacher_out(teacher), STUDENT_NAME))
        return document

    def train_document(self, variant: Variant, seed: int) -> Document:
        """The train file of one run before it is validated."""
        document: Document = {"dataset": self.dataset}
        names = self.recordings_of(variant)
        if names:
            document["caches"] = [self.cache_of(name) for name in names]
            document |= self._views(names[0], with_augment=False)
        elif variant.entry.views is not None:
            document |= self._views(variant.entry.views, with_augment=True)
        elif self.augment is not None:
            document["augment"] = self.augment
        document |= {
            "student": self.students[variant.student],
            "method": variant.entry.method,
            **self.train,
            "seed": seed,
            "evaluate": self.evaluate,
            "out": str(Path(self.out, "runs", variant.student, variant.method, f"seed-{seed}")),
            **variant.entry.train,
        }
        return document

    def recordings_of(self, variant: Variant) -> tuple[str, ...]:
        """Names of the recordings that teach a variant."""
        if variant.entry.views is not None:
            return ()
        if variant.entry.recordings is None:
            return tuple(self.recordings)
        return variant.entry.recordings

    def cache_of(self, name: str) -> str:
        """Where a recording is, or will be."""
        recording = self.recordings[name]
        if isinstance(recording, str):
            return recording
        return str(recording.get("cache") or Path(self.out, "recordings", name, "cache"))

    def teacher_out(self, name: str) -> str:
        """The folder of a teacher's run."""
        return str(self.teachers[name].get("out") or Path(self.out, "teachers", name))

    def settings(self) -> Document:
        """Everything that decides the figures: this file without its prose and folders."""
        prose = {"title", "source", "notes", "out", "titles", "published", "goals", "quick"}
        document: Document = _without_folders(
            self.model_dump(mode="json", exclude=prose, exclude_defaults=True)
        )
        return document

    def _recorded(self, name: str) -> Document:
        """The keys that a recording shares with the views of its students."""
        recording = self.recordings[name]
        assert isinstance(recording, dict)
        shared = {"dataset": self.dataset, "augment": self.augment}
        return {key: recording.get(key) or value for key, value in shared.items()}

    def _views(self, name: str, *, with_augment: bool) -> Document:
        """The dataset and seeds of a recording's views, and its recipe where no rows carry it."""
        recording = self.recordings[name]
        if isinstance(recording, str):
            return {}
        shared = self._recorded(name)
        document: Document = {"dataset": shared["dataset"], "seeds": recording.get("seeds")}
        return document | ({"augment": shared["augment"]} if with_augment else {})


class Variant(NamedTuple):
    """One student with one method: a row of the table, with a run for each seed.

    Attributes:
        name: of the row.
        student, method: keys of the file.
        entry: the method's entry.
    """

    name: str
    student: str
    method: str
    entry: VariantConfig


def load_experiment(
    path: str | Path, overrides: Sequence[str] = (), *, quick: bool = False
) -> ExperimentConfig:
    """The experiment file at `path`.

    Args:
        path: the YAML file.
        overrides: `a.b=value` each, applied last.
        quick: apply the file's `quick` section.

    Raises:
        ConfigError: one line that names the file and each bad key.
    """
    document = read_yaml(path)
    if quick:
        document = quick_form(document, where=str(path))
    return validate_config(
        ExperimentConfig, override_document(document, overrides), where=str(path)
    )


def read_shipped(name: str) -> Document:
    """The experiment file of this name that comes with the program."""
    file = resources.files("cli.experiments").joinpath("shipped", f"{name}.yaml")
    document: Document = parse_yaml(file.read_text(encoding="utf-8"), where=name)
    return document


def quick_form(document: Document, *, where: str) -> Document:
    """An experiment's document with its `quick` section applied.

    Raises:
        ConfigError: there is no such section.
    """
    changes = document.get("quick")
    if not isinstance(changes, dict):
        raise ConfigError(
            f"{where} has no quick form.",
            hint="Leave --quick out, or add a `quick` section with the keys that differ.",
        )
    return merge_documents(document, changes)


def merge_documents(document: Document, changes: Document) -> Document:
    """A copy of `document` in which mappings are merged key by key and other values replaced.

    A mapping whose `name` or `kind` changes is replaced as a whole: its other keys belong to the
    optimizer, schedule or codec that it was.
    """
    merged = copy.deepcopy(document)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, dict) and isinstance(before, dict) and not _is_other(before, value):
            merged[key] = merge_documents(before, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _is_other(before: Document, after: Document) -> bool:
    return any(key in after and after[key] != before.get(key) for key in ("name", "kind"))


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_folders(part) for k, part in value.items() if k not in FOLDERS}
    return [_without_folders(part) for part in value] if isinstance(value, list) else value


def _refuse_unknown(place: str, names: Any, known: Any) -> None:
    for name in names:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{place} {name!r} is not in this file, which has {listed}")
