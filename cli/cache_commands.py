"""The commands `info` and `verify`, which inspect an existing cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import CacheUrl, Json, emit

if TYPE_CHECKING:
    from cache_service.rows.reader import Cache

CORRUPT, INCOMPLETE = 3, 4
"""Exit codes of `verify`: see the table in the README."""


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
    recompute: Annotated[
        int, typer.Option(min=0, metavar="N", help="Also run the teacher on N views and compare.")
    ] = 0,
    repair: Annotated[
        bool, typer.Option(help="Delete commits of damaged shards, so that build records them.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=VALUE",
            help="With --recompute: open the dataset or the teacher from another place, "
            "such as dataset.root=DIR or teacher.checkpoint=FILE; repeatable.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Check every byte of a cache. Exits with 3 if one is damaged, with 4 if shards are missing."""
    from cache_service.errors import ConfigError
    from cache_service.rows.reader import open_cache
    from cache_service.rows.verify import drop_damaged_commits, verify_cache

    if settings and not recompute:
        raise ConfigError(
            "--set changes how `verify --recompute N` opens the dataset and the teacher; without "
            "it, neither is opened.",
            hint="Add --recompute 64.",
        )
    opened = open_cache(cache)
    report = verify_cache(opened)
    dropped = drop_damaged_commits(opened, report) if repair else 0
    document: dict[str, Any] = {"cache": cache, "audit": report, "dropped": dropped}
    lines = [f"{cache}: {report.rows_checked:,} rows in {report.shards_checked} shards are intact"]
    lines += [f"damaged: seed {s} shard {n}: {why}" for s, n, why in report.damaged]
    lines += [f"damaged: {why}" for _, why in report.damaged_metadata]
    if report.damaged_metadata:
        lines.append("Run the same `kd-cache build` again: it writes the metadata anew.")
    lines += [f"incomplete: seed {s} lacks {n} shards" for s, n in report.incomplete.items()]
    accepted = report.is_intact
    # Damaged rows would differ from the teacher for a reason that is already reported.
    if recompute and accepted:
        from cache_service.recording.comparison import recompute as compare_with_teacher

        comparison = compare_with_teacher(opened, recompute, settings=settings or ())
        document["recompute"] = comparison
        accepted = comparison.accepted
        lines += comparison.lines()
        if comparison.num_views < recompute:
            lines.append(
                f"{recompute:,} views were requested, but only {comparison.num_views:,} are "
                "recorded: all of them were compared"
            )
    document["accepted"] = accepted
    emit(document, as_json=json, text="\n".join(lines))
    if not accepted:
        raise typer.Exit(CORRUPT)
    if report.incomplete or not report.complete:
        raise typer.Exit(INCOMPLETE)
