"""The commands `info` and `verify`, which inspect an existing cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import CacheUrl, Json, emit

if TYPE_CHECKING:
    from cache_service.progress import ProgressDisplay
    from cache_service.recording.comparison import Comparison
    from cache_service.recording.shards import Part
    from cache_service.rows.reader import Cache
    from cache_service.rows.verify import OnProgress, VerifyProgress, VerifyReport

CORRUPT, INCOMPLETE = 3, 4
"""Exit codes of `verify`: see the table in the README."""

EVENT_S = 1.0
"""Interval of the events of `verify` where there is no terminal, seconds."""

Recompute = Annotated[
    int, typer.Option(min=0, metavar="N", help="Also run the teacher on N views and compare.")
]
ShardPart = Annotated[
    str, typer.Option(metavar="I/N", help="Check the I-th of N parts of the shards.")
]
Sample = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Check only some shards, evenly spaced: a share such as 0.01, or a number of rows "
        "such as 100000. The same X gives the same shards.",
    ),
]
Processes = Annotated[
    int, typer.Option(min=1, max=1024, metavar="N", help="Check N shards at a time.")
]
Repair = Annotated[
    bool, typer.Option(help="Delete commits of damaged shards, so that build records them.")
]
Places = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="A.B=VALUE",
        help="With --recompute: open the dataset or the teacher from another place, such as "
        "dataset.root=DIR or teacher.checkpoint=FILE; repeatable.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(info)
    app.command()(verify)


def info(cache: CacheUrl, json: Json = False) -> None:
    """Show the teacher, recipe, dataset, codec and seeds of a cache."""
    from cache_service.rows.reader import open_cache

    facts = _facts(open_cache(cache))
    emit(facts, as_json=json, text="\n".join(f"{k:<15}{_text(v)}" for k, v in facts.items()))


def _facts(cache: Cache) -> dict[str, Any]:
    from cache_service.format.seeds import describe_seeds

    spec, commits = cache.spec, cache.commits()
    complete = [seed for seed, shards in commits.items() if len(shards) == spec.num_shards]
    recorded = sum(
        stop - start for shards in commits.values() for start, stop in map(spec.shard_range, shards)
    )
    return {
        "cache": cache.url,
        "fingerprint": cache.fingerprint,
        "complete": describe_seeds(complete),
        "seeds": {str(seed): f"{len(s)}/{spec.num_shards} shards" for seed, s in commits.items()},
        "rows": recorded,
        "bytes": recorded * cache.layout.row_bytes,
        "bytes_per_row": cache.layout.row_bytes,
        "dataset": spec.dataset.model_dump(mode="json"),
        "teacher": spec.teacher.model_dump(mode="json"),
        "recipe": spec.recipe.model_dump(mode="json"),
        "scales": list(spec.scales),
        "stored_scales": list(spec.stored_scales),
        "codec": spec.codec.model_dump(mode="json"),
        "layout": spec.layout.model_dump(mode="json"),
        "versions": cache.versions,
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(part)}" for name, part in value.items())
    return str(value)


def verify(
    cache: CacheUrl,
    recompute: Recompute = 0,
    shard: ShardPart = "0/1",
    sample: Sample = None,
    processes: Processes = 1,
    repair: Repair = False,
    settings: Places = None,
    json: Json = False,
) -> None:
    """Check every byte of a cache. Exits with 3 if one is damaged, with 4 if shards are missing."""
    from cache_service.errors import ConfigError
    from cache_service.progress import ProgressDisplay
    from cache_service.recording.shards import Part
    from cache_service.rows.reader import open_cache
    from cache_service.rows.verify import drop_damaged_commits, verify_cache

    part = Part.parse(shard)
    if sample is not None and not sample > 0:
        raise ConfigError(
            f"--sample {sample:g} is not positive.", hint="Such as 0.01, or 100000 for rows."
        )
    if settings and not recompute:
        raise ConfigError(
            "--set changes how `verify --recompute N` opens the dataset and the teacher; without "
            "it, neither is opened.",
            hint="Add --recompute 64.",
        )
    opened = open_cache(cache)
    with ProgressDisplay() as display:
        report = verify_cache(
            opened,
            part=(part.index, part.count),
            sample=sample,
            processes=processes,
            on_progress=_progress_on(display),
        )
    dropped = drop_damaged_commits(opened, report) if repair else 0
    document: dict[str, Any] = {"cache": cache, "audit": report, "dropped": dropped}
    lines = _report_lines(cache, report, part)
    accepted = report.is_intact
    # Damaged rows would differ from the teacher for a reason that is already reported.
    if recompute and accepted:
        comparison, more = _recompute(opened, recompute, settings or [])
        document["recompute"] = comparison
        accepted = comparison.accepted
        lines += more
    document["accepted"] = accepted
    emit(document, as_json=json, text="\n".join(lines))
    if not accepted:
        raise typer.Exit(CORRUPT)
    if report.incomplete or not report.complete:
        raise typer.Exit(INCOMPLETE)


def _recompute(cache: Cache, num_views: int, settings: list[str]) -> tuple[Comparison, list[str]]:
    from cache_service.recording.comparison import recompute

    comparison = recompute(cache, num_views, settings=settings)
    lines = comparison.lines()
    if comparison.num_views < num_views:
        lines.append(
            f"{num_views:,} views were requested, but only {comparison.num_views:,} are "
            "recorded: all of them were compared"
        )
    return comparison, lines


def _report_lines(cache: str, report: VerifyReport, part: Part) -> list[str]:
    intact = report.shards_checked - len(report.damaged)
    first = f"{cache}: {report.rows_checked:,} rows in {intact} shards are intact"
    if part.count > 1:
        first += f"; part {part.index}/{part.count}"
    if report.sample:
        first += (
            f"; a sample: {report.shards_checked} of {report.shards_recorded} recorded shards, "
            "evenly spaced"
        )
    lines = [first]
    lines += [f"damaged: seed {s} shard {n}: {why}" for s, n, why in report.damaged]
    lines += [f"damaged: {why}" for _, why in report.damaged_metadata]
    if report.damaged_metadata:
        lines.append("Run the same `kd-cache build` again: it writes the metadata anew.")
    lines += [f"incomplete: seed {s} lacks {n} shards" for s, n in report.incomplete.items()]
    return lines


def _progress_on(display: ProgressDisplay) -> OnProgress:
    """Show a progress bar if stderr is a terminal, otherwise an event every EVENT_S."""
    shown_s = time.monotonic()

    def show(progress: VerifyProgress) -> None:
        nonlocal shown_s
        if display.is_terminal:
            display.update_bar(
                title="shards",
                completed=progress.shards_done,
                total=progress.shards_total,
                details=f"{progress.rows_done:,} rows  {progress.damaged} damaged",
            )
        elif time.monotonic() - shown_s >= EVENT_S:
            shown_s = time.monotonic()
            display.write_event({"event": "verified", **progress._asdict()})

    return show
