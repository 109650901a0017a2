"""`bench`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cache_service.errors import ConfigError
from cache_service.wording import human_bytes
from cli.options import Json, emit

if TYPE_CHECKING:
    from cli.experiments.bench.http import HttpBench


def register(app: typer.Typer) -> None:
    """Add the command of this file."""
    app.command()(bench)


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="http.", show_default=False)],
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer requests: seconds instead of minutes.")
    ] = False,
    json: Json = False,
) -> None:
    """Measure this machine: `http`, the service against a route that returns a constant."""
    if name != "http":
        raise ConfigError(f"bench {name} is not known.", hint="Type: kd-cache bench http")
    from cli.experiments.bench.http import FULL, QUICK, run_http_bench

    found = run_http_bench(QUICK if quick else FULL, lambda line: typer.echo(line, err=True))
    emit(found.document(), as_json=json, text=_table(found))


def _table(found: HttpBench) -> str:
    lines = [
        f"{name}s: {kind.num_rows} rows, {human_bytes(kind.num_bytes)} an answer"
        for name, kind in found.kinds.items()
    ]
    columns = (
        f"{'':8}{'clients':>8}{'service/s':>11}{'constant/s':>12}{'ratio':>7}{'p50':>10}"
        f"{'p99':>10}{'':>14}"
    )
    lines += [f"{found.requests:,} requests to the service", "", columns]
    lines += [
        f"{each.kind:8}{each.concurrency:>8}{each.per_second:>11.0f}"
        f"{each.constant_per_second:>12.0f}{each.ratio:>7.0%}{each.p50_ms:>7.1f} ms"
        f"{each.p99_ms:>7.1f} ms{human_bytes(each.bytes_per_second):>12}/s"
        for each in found.measured
    ]
    document = found.document()
    lines.append("")
    lines += [
        f"{kind}s reach {document['ratios'][kind]:.0%} of the constant (target {target:.0%})"
        for kind, target in document["targets"].items()
    ]
    before, after = found.before, found.after
    lines.append(
        f"memory of the service: {human_bytes(before.anonymous)} before, "
        f"{human_bytes(after.anonymous)} after; with mapped files {human_bytes(before.resident)} "
        f"and {human_bytes(after.resident)}"
    )
    return "\n".join(lines)
