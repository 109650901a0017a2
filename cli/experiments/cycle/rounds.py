"""The rounds of a cycle as build and train files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from cache_service.configfile import validate_config
from cache_service.recording.config import BuildConfig
from cli.experiments.cycle.config import CycleConfig, Document
from distill.config import TrainConfig
from distill.export import STUDENT_NAME


class Source(NamedTuple):
    """Somebody who teaches.

    Attributes:
        name: for the table.
        cache: of what they said.
        build: the file that records it; None where it is recorded already.
    """

    name: str
    cache: str
    build: Document | None


class Round(NamedTuple):
    """One round before it is run.

    Attributes:
        number: from 1.
        sources: who teaches in it.
        students: train files by method; of several, the best student goes on.
    """

    number: int
    sources: tuple[Source, ...]
    students: dict[str, Document]


class Plan(NamedTuple):
    """A whole cycle, worked out from its file alone."""

    config: CycleConfig
    where: str

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each method: its own, numbered where several have the same."""
        names = [str(method.get("name", "?")) for method in self.config.methods]
        times, seen = Counter(names), Counter[str]()
        labels = []
        for name in names:
            seen[name] += 1
            labels.append(name if times[name] == 1 else f"{name}-{seen[name]}")
        return tuple(labels)

    def first_sources(self) -> tuple[Source, ...]:
        """The teachers of the first round."""
        return tuple(
            Source(told, told, None)
            if isinstance(told, str)
            else self._record(f"teacher-{number}", str(told.get("model", "?")), told)
            for number, told in enumerate(self.config.teachers, 1)
        )

    def make_round(self, number: int, sources: tuple[Source, ...]) -> Round:
        """A round in which of all `sources` so far those teach that are kept."""
        keep = self.config.keep
        kept = sources if keep == "all" else sources[-keep:]
        methods = zip(self.labels, self.config.methods, strict=True)
        students = {
            label: self._train(self._out(f"round-{number}", label), method, kept)
            for label, method in methods
        }
        return Round(number, kept, students)

    def next_source(self, number: int, label: str) -> Source:
        """The student of a round, by one of its methods, as a teacher."""
        document = self._train(self._out(f"round-{number}", label), {}, ())
        student = document["student"]
        if self.config.tokens:
            # The number of its own tokens, not of the next one's.
            student = self._with_tokens(student, self.num_teachers(number))
        teacher = {key: student[key] for key in ("model", "model_args") if key in student}
        teacher["checkpoint"] = str(Path(document["out"], STUDENT_NAME))
        return self._record(f"round-{number}", f"student {number}", teacher)

    def num_teachers(self, number: int) -> int:
        """Of a round."""
        known = len(self.config.teachers) + number - 1
        return known if self.config.keep == "all" else min(known, self.config.keep)

    def build_config(self, source: Source) -> BuildConfig:
        """The validated build file of a source that is not recorded yet.

        Raises:
            ConfigError: one line that lists each bad key.
        """
        return validate_config(BuildConfig, source.build, where=f"{self.where}: build")

    def train_config(self, round_: Round, label: str) -> TrainConfig:
        """The validated train file of a student.

        Raises:
            ConfigError: one line that lists each bad key.
        """
        where = f"{self.where}: train, method {label}"
        return validate_config(TrainConfig, round_.students[label], where=where)

    def _record(self, folder: str, name: str, teacher: Document) -> Source:
        cache = self._out(folder, "cache")
        return Source(name, cache, {**self.config.build, "cache": cache, "teacher": teacher})

    def _train(self, out: str, method: Document, sources: tuple[Source, ...]) -> Document:
        document = {
            **self.config.train,
            "dataset": self.config.build.get("dataset"),
            "caches": [source.cache for source in sources],
            "seeds": self.config.build.get("seeds"),
            "method": method,
            "out": out,
        }
        if self.config.tokens and sources and isinstance(document.get("student"), dict):
            document["student"] = self._with_tokens(document["student"], len(sources))
        return document

    def _with_tokens(self, student: Document, count: int) -> Document:
        args = {**(student.get("model_args") or {}), "num_tokens": count}
        return {**student, "model_args": args}

    def _out(self, *parts: str) -> str:
        return str(Path(self.config.out, *parts))
