"""What `kd-cache bench` measured, from its JSON documents in docs/results, to Markdown.

The pages of a benchmark are made anew from its figures, so a goal that changes is compared with
what was measured before it changed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cli.experiments.bench import stream, variants, views
from cli.experiments.bench.benchmarks import BENCHMARKS
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures
from cli.experiments.bench.pairs import PAIRS

RESULTS = Path(__file__).parent / "results"

MACHINES = ("cpu", "gpu")
"""Folders of results: of a machine without a GPU, and of one with."""


class Measured(NamedTuple):
    """A committed run of a benchmark: its folder, its page as it would be now, and its machine."""

    folder: str
    page: BenchPage
    machine: dict[str, Any]

    @property
    def link(self) -> str:
        """Path of its page from docs/."""
        return f"results/{self.folder}/{self.page.name}.md"

    @property
    def device(self) -> str:
        """Its device, and how many cores the benchmark had."""
        return f"{self.machine['device']}, {self.machine['cores']} cores"


def measured() -> Iterator[Measured]:
    """Every committed run, in the order of the benchmarks."""
    for name, benchmark in BENCHMARKS.items():
        for folder in MACHINES:
            path = RESULTS / folder / f"{name}.json"
            if path.exists():
                document = json.loads(path.read_text())
                device = "cuda" if folder == "gpu" else "cpu"
                options = BenchOptions((), device, quick=document["quick"], on_message=print)
                page = benchmark.page(document["figures"], options)
                yield Measured(folder, page, document["machine"])


def goals() -> str:
    """A line for every goal of every run."""
    rows = ["| command | on | ratio | goal | measured | |", "|---|---|---|---|---|---|"]
    for each in measured():
        command = f"[`bench {each.page.name}`]({each.link})"
        rows += [
            f"| {' | '.join([command, each.machine['device'], *goal.row])} |"
            for goal in each.page.goals
        ]
    return "\n".join(rows)


# The table of the README.


def _training(column: str, *, small: bool) -> Callable[[Figures], str]:
    """Of the pair with small or with large views: KD from the cache, and with the live teacher."""

    def cell(figures: Figures) -> str:
        chosen = [each for each in figures if PAIRS[each["pair"]].is_small == small]
        ratios = {each["variant"]: _median(each[column]) for each in chosen}
        if not ratios:
            return ""
        cached, live = ratios[variants.CACHE_KD.title], ratios[variants.LIVE_KD.title]
        return f"{cached:.2f} (live {live:.2f})"

    return cell


def _recording(figures: Figures) -> str:
    return ", ".join(f"{each['of_slowest']:.2f} ({each['teacher']})" for each in figures)


def _single_view(figures: Figures) -> str:
    return f"{_median(_of_photographs(figures, views.SINGLE)['ratios']):.2f}"


def _several_views(figures: Figures) -> str:
    return f"{1 / _median(_of_photographs(figures, views.SEVERAL)['ratios']):.2f}"


def _of_photographs(figures: Figures, variant: str) -> dict[str, Any]:
    [chosen] = (e for e in figures if "JPEG" in e["images"] and e["variant"] == variant)
    return chosen


def _cpu_bound_step(figures: Figures) -> str:
    return f"{_median(_of_photographs(figures, views.RECORDED)['ratios']):.2f}"


def _beside_formats(figures: Figures) -> str:
    """Warm local rows of 2 kB: the ratio of each order, with the name of the fastest format."""
    cells = []
    for order in (stream.IN_ORDER, stream.AT_RANDOM):
        own = _own_rows(figures, order)
        best = stream.fastest_other(figures, own)
        cells.append(f"{stream.ratio_to(own, best):.1f} {order} ({best['format']})")
    return ", ".join(cells)


def _own_rows(figures: Figures, order: str) -> dict[str, Any]:
    wanted = (stream.LOCAL, stream.WARM, order, stream.LOGITS, stream.SHOWN_BYTES)
    names = ("where", "state", "order", "format", "row_bytes")
    [own] = (each for each in figures if tuple(each[name] for name in names) == wanted)
    return own


def _rows(order: str) -> Callable[[Figures], str]:
    def cell(figures: Figures) -> str:
        own = _own_rows(figures, order)
        speed = statistics.median(own["rows_per_s"])
        return f"{_median(own['of_floor']):.2f} ({speed / 1e6:.1f} million a second)"

    return cell


def _median(ratios: float | list[float]) -> float:
    return statistics.median(ratios) if isinstance(ratios, list) else ratios


COSTS: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "step from the cache / labels alone, 32 px": ("step", _training("ratios", small=True)),
    "step from the cache / labels alone, 224 px": ("step", _training("ratios", small=False)),
    "memory from the cache / student alone, 32 px": (
        "memory",
        _training("of_labels_alone", small=True),
    ),
    "memory from the cache / student alone, 224 px": (
        "memory",
        _training("of_labels_alone", small=False),
    ),
    "recorded rows / the slowest of teacher, views, disk": ("build", _recording),
    "rows of 2 kB in order / a copy of memory-mapped ones": ("stream", _rows(stream.IN_ORDER)),
    "rows of 2 kB at random / a gather of such": ("stream", _rows(stream.AT_RANDOM)),
    "rows of 2 kB / the fastest other format": ("stream", _beside_formats),
    "time of a view of a JPEG / torchvision's": ("views", _single_view),
    "views per CPU second, four of one decode / one": ("views", _several_views),
    "CPU-bound step, four views of one decode / labels alone": ("views", _cpu_bound_step),
}
"""What is measured beside what, with the benchmark and the cell of its figures."""


def costs() -> str:
    """The README's table: a column for each machine, empty where it has not run a benchmark."""
    runs = {(each.folder, each.page.name): each for each in measured()}
    heads = [next(e.device for e in runs.values() if e.folder == folder) for folder in MACHINES]
    rows = [f"| | {' | '.join(heads)} |", "|---|---|---|"]
    for what, (bench, cell) in COSTS.items():
        found = [runs.get((folder, bench)) for folder in MACHINES]
        cells = ["" if run is None else cell(list(run.page.figures)) for run in found]
        if any(cells):
            rows.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(rows)
