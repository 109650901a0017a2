"""The page of `bench http`, which is made without torch, as the service runs without it."""

from __future__ import annotations

from typing import Any

from cache_service.human_format import human_bytes
from cli.experiments.bench import http
from cli.experiments.bench.cpu import CONNECTIONS
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, Goal, write_page

LIBRARIES = ("fastapi", "uvicorn", "httptools")
"""Named in the page: they are most of what a request costs."""

CPU_GOALS = dict(
    zip((f"range of {rows} rows" for rows in http.SMALL_ROWS), (1.5, 6.0), strict=True)
)
"""Largest wanted CPU time of a request, as a multiple of nginx's for the same bytes."""


def bench_http(options: BenchOptions, out: str | None) -> tuple[BenchPage, list[str]]:
    """Run it, and write its page to a folder if one is named. Returns the files, too.

    Raises:
        KdCacheError: a server did not start, or its responses are wrong.
    """
    result = http.run_http_bench(http.QUICK if options.quick else http.FULL, options.on_message)
    page = http_page([result.document()])
    return page, [] if out is None else write_page(page, options, out)


def http_page(figures: Figures) -> BenchPage:
    """The page of one run."""
    [run] = figures
    own, mapped = (
        " and ".join(human_bytes(run["memory"][when][kind]) for when in ("before", "after"))
        for kind in ("anonymous", "resident")
    )
    return BenchPage(
        name="http",
        title="The service, beside nginx and a route that returns a constant",
        notes=[
            (
                f"{run['requests']:,} requests to the service, one worker, over loopback; service "
                "and constant take turns, and a ratio is the median of the rounds' ratios. CPU "
                "time is that of a request, beside nginx with a static file of the same bytes "
                "where nginx is installed."
            ),
            (
                f"Memory of the service before and after all requests: {own}; with mapped files "
                f"{mapped}."
            ),
        ],
        header=(
            *("request", "bytes", "clients", "service", "constant", "nginx"),
            *("ratio", "p50", "p99"),
        ),
        rows=[*(_rate(run, each) for each in run["measured"]), *map(_cpu, run["cpu_us"])],
        figures=figures,
        goals=_goals(run),
        libraries=LIBRARIES,
    )


def _rate(run: dict[str, Any], each: dict[str, Any]) -> list[str]:
    kind = run["kinds"][each["kind"]]
    return [
        f"{each['kind']} of {kind['rows']} rows",
        human_bytes(kind["bytes"]),
        str(each["concurrency"]),
        f"{each['per_second']:,.0f} a second",
        f"{each['constant_per_second']:,.0f} a second",
        "",
        f"{each['ratio']:.2f} of the constant",
        f"{each['p50_ms']:.1f} ms",
        f"{each['p99_ms']:.1f} ms",
    ]


def _cpu(each: dict[str, Any]) -> list[str]:
    nginx = each["nginx"]
    return [
        each["kind"],
        human_bytes(each["num_bytes"]),
        str(CONNECTIONS),
        f"{each['service']:.0f} us of CPU",
        f"{each['constant']:.0f} us of CPU",
        "" if nginx is None else f"{nginx:.0f} us of CPU",
        f"{each['service'] / nginx:.1f} of nginx" if nginx else "",
        "",
        "",
    ]


def _goals(run: dict[str, Any]) -> list[Goal]:
    rates = [
        Goal(f"{kind}s: requests a second / the constant", bound, run["ratios"][kind], True)
        for kind, bound in http.TARGETS.items()
    ]
    return rates + [
        Goal(f"{each['kind']}: CPU / nginx", bound, each["service"] / each["nginx"])
        for each in run["cpu_us"]
        if (bound := CPU_GOALS.get(each["kind"])) and each["nginx"]
    ]
