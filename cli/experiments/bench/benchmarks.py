"""The benchmarks of training and recording, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from cache_service.errors import ConfigError
from cli.experiments.bench import build, memory, step, total
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, write_page
from cli.experiments.bench.pairs import Pair, find_pairs
from distill.students import choose_device


class Benchmark(NamedTuple):
    """A benchmark: what it measures of one pair, and its page of all figures so far."""

    measure: Callable[[Pair, BenchOptions], Figures]
    page: Callable[[Figures, BenchOptions], BenchPage]


BENCHMARKS = {
    "step": Benchmark(step.measure_step, step.step_page),
    "memory": Benchmark(memory.measure_memory, memory.memory_page),
    "build": Benchmark(build.measure_build, build.build_page),
    "total": Benchmark(total.measure_total, total.total_page),
}


def run_benchmark(name: str, options: BenchOptions, out: str | None) -> tuple[BenchPage, list[str]]:
    """Run a benchmark. Returns its page and the files that were written.

    Args:
        name: of the benchmark.
        options: pairs, device and size.
        out: folder of the page, which is written after every pair, so that a run that is
            interrupted leaves what it has measured; None to write nothing.

    Raises:
        ConfigError: there is no such benchmark, pair or device.
    """
    if name not in BENCHMARKS:
        known = ", ".join([*BENCHMARKS, "http"])
        raise ConfigError(
            f"bench {name} is not known: there are {known}.", hint="Type: kd-cache bench http"
        )
    choose_device(options.device)
    benchmark = BENCHMARKS[name]
    figures: Figures = []
    written: list[str] = []
    for pair in find_pairs(options.pairs, quick=options.quick, on_gpu=options.on_gpu):
        figures += benchmark.measure(pair, options)
        page = benchmark.page(figures, options)
        if out is not None:
            written = write_page(page, options, out)
    return page, written
