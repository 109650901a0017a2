"""A cycle file: who teaches first, how each student is trained, and who teaches the next one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from cache_service.configfile import load_yaml_config
from cache_service.format.frozen import Frozen

Document = dict[str, Any]

SAID_BY_CYCLE = {
    "build": ("cache", "teacher"),
    "train": ("dataset", "caches", "augment", "seeds", "method", "out", "students"),
}
"""Keys of a build and of a train file that a cycle works out for every round."""


class CycleConfig(Frozen):
    """A cycle file."""

    out: Annotated[str, Field(min_length=1, description="Folder of everything written.")]
    rounds: Annotated[int, Field(ge=1, le=100, description="Students, one after the other.")]
    teachers: Annotated[
        tuple[str | Document, ...],
        Field(
            min_length=1,
            description="Of the first round: recorded caches, or a build file's `teacher:`.",
        ),
    ]
    build: Annotated[
        Document, Field(description="A build file without cache and teacher: how to record.")
    ]
    train: Annotated[
        Document,
        Field(description="A train file without dataset, caches and method: how to train."),
    ]
    methods: Annotated[
        tuple[Document, ...],
        Field(
            min_length=1,
            description="`method:` of a train file; of several, the best student goes on.",
        ),
    ]
    keep: Annotated[
        Literal["all"] | Annotated[int, Field(ge=1)],
        Field(description="Teachers of a round: all so far, or the newest ones."),
    ] = "all"
    tokens: Annotated[
        bool, Field(description="Give the student one distillation token for each teacher.")
    ] = False

    @field_validator("build", "train")
    @classmethod
    def _check_part(cls, part: Document, info: Any) -> Document:
        taken = sorted(part.keys() & set(SAID_BY_CYCLE[info.field_name]))
        if taken:
            raise ValueError(f"{taken[0]} is said by the cycle, for every round anew")
        if info.field_name == "train" and not part.get("evaluate"):
            raise ValueError("evaluate is missing: rounds are compared, and students chosen, by it")
        return part


def load_cycle(path: str | Path, overrides: Sequence[str] = ()) -> CycleConfig:
    """The cycle file at `path`, with `a.b=value` overrides applied.

    Raises:
        ConfigError: one line that names the file and each bad key.
    """
    return load_yaml_config(CycleConfig, path, overrides)
