"""The benchmarks by name. The one of the service is `cli.experiments.bench.http`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from cache_service.errors import ConfigError
from cli.experiments.bench import build, codec, memory, step, stream, total, views
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, write_page
from cli.experiments.bench.pairs import Pair, find_pairs
from distill.students import choose_device


class Benchmark(NamedTuple):
    """A benchmark: its figures, part by part, and its page of all figures so far."""

    measure: Callable[[BenchOptions], Iterator[Figures]]
    page: Callable[[Figures, BenchOptions], BenchPage]


def _each_pair(
    measure: Callable[[Pair, BenchOptions], Figures],
) -> Callable[[BenchOptions], Iterator[Figures]]:
    """A benchmark of pairs of networks, one pair a part."""

    def parts(options: BenchOptions) -> Iterator[Figures]:
        for pair in find_pairs(options.pairs, quick=options.quick, on_gpu=options.on_gpu):
            yield measure(pair, options)

    return parts


BENCHMARKS = {
    "step": Benchmark(_each_pair(step.measure_step), step.step_page),
    "memory": Benchmark(_each_pair(memory.measure_memory), memory.memory_page),
    "build": Benchmark(_each_pair(build.measure_build), build.build_page),
    "total": Benchmark(_each_pair(total.measure_total), total.total_page),
    "stream": Benchmark(stream.measure_stream, stream.stream_page),
    "views": Benchmark(views.measure_views, views.views_page),
    "codec": Benchmark(codec.measure_codec, codec.codec_page),
}


def run_benchmark(name: str, options: BenchOptions, out: str | None) -> tuple[BenchPage, list[str]]:
    """Run a benchmark. Returns its page and the files that were written.

    Args:
        name: of the benchmark.
        options: what is measured, on what device, and how much.
        out: folder of the page, which is written after every part, so that a run that is
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
    for part in benchmark.measure(options):
        figures += part
        page = benchmark.page(figures, options)
        if out is not None:
            written = write_page(page, options, out)
    return page, written
