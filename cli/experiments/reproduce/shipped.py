"""Experiment files of the reproductions, and what a user may change about one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from cache_service.config import validate_config
from cli.experiments.experiment_file import (
    Document,
    ExperimentConfig,
    merge_documents,
    quick_form,
    read_shipped,
)
from cli.experiments.html_report import Curve
from cli.experiments.result_table import Table
from cli.experiments.runner import OnMessage


class Options(NamedTuple):
    """The options of the command line.

    Attributes:
        name: of the reproduction.
        out: folder for everything written.
        data: folder of the dataset's files.
        runs: per figure; they have seeds 0, 1, ...
        quick: the short form.
        on_message: called with a line at every step.
        pairs: teachers and students to compare, as typed; empty for the usual ones.
        device: as in a train file.
        changes: keys of the experiment file that differ, for tests.
    """

    name: str
    out: str
    data: str
    runs: int
    quick: bool
    on_message: OnMessage
    pairs: tuple[str, ...] = ()
    device: str = "auto"
    changes: Document | None = None

    @property
    def folder(self) -> str:
        """Of all runs; those of the short form are other runs, so they lie elsewhere."""
        return str(Path(self.out, "quick" if self.quick else "full"))

    @property
    def command(self) -> str:
        """What makes the table again, without the folders, which are the user's."""
        quick = " --quick" if self.quick else ""
        pairs = "".join(f" --pair {pair}" for pair in self.pairs)
        return f"kd-cache reproduce {self.name}{quick}{pairs} --seeds {self.runs}"


class Made(NamedTuple):
    """A table that was measured, and the curves of its report."""

    table: Table
    curves: dict[str, Curve]


def shipped_document(options: Options, *, root: str) -> Document:
    """A shipped experiment file with the options put in; `root` is the folder of the datasets."""
    document = read_shipped(options.name)
    if options.quick:
        document = quick_form(document, where=options.name)
    document = merge_documents(document, options.changes or {})
    document |= {"out": str(Path(options.folder, options.name)), "runs": options.runs}
    document["train"]["device"] = options.device
    for recording in document.get("recordings", {}).values():
        recording["device"] = options.device
    _set_root(document, root)
    return document


def shipped_experiment(document: Document, options: Options) -> ExperimentConfig:
    """The document as an experiment.

    Raises:
        ConfigError: one line that lists each bad key.
    """
    return validate_config(ExperimentConfig, document, where=options.name)


def _set_root(value: Any, root: str) -> None:
    """Put the folder of the data into every dataset."""
    if isinstance(value, dict):
        if "root" in value:
            value["root"] = root
        for part in value.values():
            _set_root(part, root)
