"""What a reproduction is, and what it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cli.experiments.reproduce.table import Table

Say = Callable[[str], None]


class Order(NamedTuple):
    """One run of one reproduction.

    Attributes:
        out: folder for everything written.
        data: folder of the dataset's files.
        seeds: runs per figure; they use seeds 0, 1, ...
        quick: the short form.
        say: told what is going on, in sentences.
        pairs: teachers and students to compare, as typed; empty for the usual ones.
        device: as in a train file.
    """

    out: str
    data: str
    seeds: int
    quick: bool
    say: Say
    pairs: tuple[str, ...] = ()
    device: str = "auto"

    def folder(self, *parts: str) -> str:
        """A folder below `out`; the short form's runs are other runs, so they lie elsewhere."""
        return str(Path(self.out, "quick" if self.quick else "full", *parts))

    def command(self, name: str) -> str:
        """What the user typed, less the folders, which are theirs."""
        quick = " --quick" if self.quick else ""
        pairs = "".join(f" --pair {pair}" for pair in self.pairs)
        return f"kd-cache reproduce {name}{quick}{pairs} --seeds {self.seeds}"


@dataclass(frozen=True)
class Reproduction:
    """A published table that can be made again.

    Attributes:
        name: as typed.
        summary: one line.
        data: where its dataset is looked for by default.
        seeds: runs per figure by default, in the full form; the quick one has 1.
        run: trains what is not trained yet, and measures.
        options: of `pair` and `device`, those that mean something to it.
    """

    name: str
    summary: str
    data: str
    seeds: int
    run: Callable[[Order], Table]
    options: frozenset[str] = frozenset()
