"""What every benchmark prints and keeps: its table, the machine, the versions and the command."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

OnMessage = Callable[[str], None]


class BenchOptions(NamedTuple):
    """What the command line asks of a benchmark.

    Attributes:
        pairs: names of pairs; empty for the default ones.
        device: cpu or cuda.
        quick: small sizes: whether it works, not how fast it is.
        on_message: called with a line about what runs now.
        images: folder of photographs; None for generated ones.
        s3: URL in a bucket below which rows may be written; None to leave buckets out.
        cache: a recording of answers; None for made-up ones.
    """

    pairs: tuple[str, ...]
    device: str
    quick: bool
    on_message: OnMessage
    images: str | None = None
    s3: str | None = None
    cache: str | None = None

    @property
    def on_gpu(self) -> bool:
        """Whether the networks run on a GPU."""
        return self.device.startswith("cuda")

    @property
    def arithmetic(self) -> str:
        """A sentence on the number types of the networks."""
        if self.on_gpu:
            return "Teacher and student in bfloat16 (autocast), both in channels-last."
        return "Teacher and student in float32."


Figures = list[dict[str, Any]]


class Goal(NamedTuple):
    """A figure that is wanted, and what was measured.

    Attributes:
        what: is measured, and beside what.
        bound: of the figure.
        measured: the figure.
        at_least: whether the bound is the smallest wanted figure, and not the largest.
    """

    what: str
    bound: float
    measured: float
    at_least: bool = False

    @property
    def is_met(self) -> bool:
        """Whether the figure is on the right side of the bound, as printed."""
        own = round(self.measured, 3)
        return own >= self.bound if self.at_least else own <= self.bound

    @property
    def row(self) -> list[str]:
        """The goal, the figure, and by how much the goal is missed if it is."""
        bound = f"at {'least' if self.at_least else 'most'} {self.bound:.2f}"
        missed = f"missed by {abs(self.measured - self.bound):.3f}"
        result = "met" if self.is_met else missed
        return [self.what, bound, f"{self.measured:.3f}", result]


class BenchPage(NamedTuple):
    """The result of a benchmark.

    Attributes:
        name: of the benchmark.
        title: one line.
        notes: sentences on how it was measured.
        header: of the table.
        rows: of the table, as people read them.
        figures: every figure, for programs.
        goals: what of it was wanted.
        plot: an SVG file; empty for none.
        libraries: whose versions it names; empty for those that render and train.
    """

    name: str
    title: str
    notes: Sequence[str]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: Sequence[dict[str, Any]]
    goals: Sequence[Goal] = ()
    plot: str = ""
    libraries: Sequence[str] = ()

    @property
    def versions(self) -> dict[str, str]:
        """Versions of its libraries."""
        if self.libraries:
            return {name: metadata.version(name) for name in self.libraries}
        from cache_service.views.identity import library_versions

        return library_versions()

    def document(self, options: BenchOptions) -> dict[str, Any]:
        """Return a JSON document with the machine and the versions."""
        return {
            "bench": self.name,
            "quick": options.quick,
            "machine": describe_machine(options.device),
            "versions": self.versions,
            "goals": [{**each._asdict(), "is_met": each.is_met} for each in self.goals],
            "figures": list(self.figures),
        }

    def markdown(self, options: BenchOptions) -> str:
        """Return the page."""
        machine = describe_machine(options.device)
        versions = self.versions
        named = ", ".join(f"{name} {versions[name]}" for name in self.libraries or ("torch",))
        return "\n".join(
            [
                f"# {self.title}",
                "",
                f"`kd-cache bench {self.name}` on {machine['device']}, {machine['cores']} CPU "
                f"cores; {named}, Python {machine['python']}; load average {machine['load']} at "
                "the end."
                + (" Quick form: it shows that the benchmark works." if options.quick else ""),
                "",
                *([f"![{self.title}]({self.name}.svg)", ""] if self.plot else []),
                *_table(self.header, self.rows),
                "",
                *self.notes,
                "",
                *self._goal_lines(),
            ]
        )

    def _goal_lines(self) -> list[str]:
        if not self.goals:
            return []
        return [*_table(("ratio", "goal", "measured", ""), [each.row for each in self.goals]), ""]


def write_page(page: BenchPage, options: BenchOptions, out: str) -> list[str]:
    """Write `NAME.md`, `NAME.json` and, if there is a plot, `NAME.svg`; return their paths."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text, data = folder / f"{page.name}.md", folder / f"{page.name}.json"
    text.write_text(page.markdown(options))
    data.write_text(json.dumps(page.document(options), indent=2) + "\n")
    if not page.plot:
        return [str(text), str(data)]
    plot = folder / f"{page.name}.svg"
    plot.write_text(page.plot)
    return [str(text), str(data), str(plot)]


def describe_machine(device: str) -> dict[str, Any]:
    """Return the device, CPU cores, versions of Python and the system, and the load.

    A load far above the cores says that other programs ran, too.
    """
    return {
        "device": _gpu_name() if device.startswith("cuda") else cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "system": platform.system(),
        "load": round(os.getloadavg()[0], 1),
    }


def _gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def cpu_name() -> str:
    """Return the model of the CPU, where the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def spread(values: Sequence[float]) -> str:
    """Return the median with the least and the largest value."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
