"""The commands `plan` and `build`, which record a teacher."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache_service.errors import ConfigError
from cache_service.human_format import human_bytes, human_seconds
from cli.options import File, Json, Settings, emit

if TYPE_CHECKING:
    from cache_service.progress import ProgressDisplay
    from cache_service.recording.build_config import BuildConfig
    from cache_service.recording.plan import BuildPlan
    from cache_service.recording.shards import OnProgress, Part, Progress


class Engine(StrEnum):
    """The way in which worker processes of a build are started."""

    LOCAL = "local"
    RAY = "ray"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(plan)
    app.command()(build)


def plan(file: File, settings: Settings = None, json: Json = False) -> None:
    """Estimate the rows, bytes, time and memory of a build, and score its teacher.

    Writes a few objects where the cache will be, and removes them.
    """
    from cache_service.config import load_yaml_config
    from cache_service.recording.build_config import BuildConfig
    from cache_service.recording.context import open_build
    from cache_service.recording.plan import make_plan

    config = load_yaml_config(BuildConfig, file, settings or [])
    found = make_plan(open_build(config))
    emit(found, as_json=json, text=_plan_text(found))


def _plan_text(plan: BuildPlan) -> str:
    lines = [
        f"cache        {plan.cache} (fingerprint {plan.fingerprint[:12]})",
        f"dataset      {plan.dataset}",
        f"seeds        {plan.seeds}",
        f"reuse        {plan.reuse}",
        f"rows         {plan.rows:,} views, {plan.rows_pending:,} not recorded yet",
        f"shards       {plan.shards} of {plan.shard_rows:,} rows",
        (
            f"bytes        {'at most ' if plan.is_compressed else ''}"
            f"{human_bytes(plan.bytes_total)} ({plan.bytes_per_row:,} B a view, "
            f"stored scales {list(plan.stored_scales)}) in {plan.objects:,} objects"
        ),
        f"weights      {plan.teacher_weights}",
        (
            f"rendering    {plan.render_rows_per_s:,.0f} views/s in one process, "
            f"{plan.workers or 'no'} rendering processes, {plan.busy_workers} to hide it behind "
            "the other stages"
        ),
        (
            f"teacher      {plan.teacher_rows_per_s:,.0f} views/s, encoding "
            f"{plan.encode_rows_per_s:,.0f} views/s"
        ),
        *_storage_line(plan),
        (
            f"time         {human_seconds(plan.wall_s)} for what is not recorded, by "
            f"{plan.limit}; a kill costs at most {human_seconds(plan.kill_s)} of it"
        ),
        f"memory       {_memory(plan)}",
        (
            f"an epoch     {plan.bucket_requests:,} requests of a bucket, or "
            f"{plan.server_requests:,} of a server with disk_cache"
        ),
        (
            f"score        {plan.accuracy:.1%} of {plan.scored_samples} samples right "
            f"(chance {plan.chance:.1%})"
        ),
    ]
    if plan.left_out:
        lines.insert(2, f"not taken    {plan.left_out}")
    if plan.long_shards:
        lines.append(f"long shards  {plan.long_shards}")
    if plan.class_order:
        lines.append(f"class order  the teacher's classes look like {plan.class_order}")
    if plan.normalization:
        lines.append(f"normalized   {plan.normalization}")
    return "\n".join(lines)


def _storage_line(plan: BuildPlan) -> list[str]:
    if plan.write_rows_per_s is None:
        return []
    rate = f"{plan.write_rows_per_s:,.0f} views/s"
    return [f"storage      {rate}, measured by objects written there and removed"]


def _memory(plan: BuildPlan) -> str:
    here = f"{human_bytes(plan.memory_bytes)} in this process, with dataset and teacher"
    if plan.device_bytes is None:
        return here
    return f"{here}; {human_bytes(plan.device_bytes)} on the GPU at the batch size of the build"


def build(
    file: File,
    seeds: Annotated[
        str | None, typer.Option(help="Record only these seeds of the file, such as 0:8.")
    ] = None,
    engine: Annotated[
        Engine, typer.Option(help="Run worker processes here or as Ray actors.")
    ] = Engine.LOCAL,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Ray cluster; by default RAY_ADDRESS, or one of this machine for the build.",
        ),
    ] = None,
    shard: Annotated[
        str, typer.Option(metavar="I/N", help="Record the I-th of N parts, one per machine.")
    ] = "0/1",
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Record the logits of a teacher. Run the same command again to resume an interrupted build."""
    from cache_service.config import load_yaml_config
    from cache_service.format.seeds import describe_seeds
    from cache_service.progress import ProgressDisplay
    from cache_service.recording.build_config import BuildConfig
    from cache_service.recording.shards import Part

    config = load_yaml_config(BuildConfig, file, settings or [])
    chosen, config = config.choose_seeds(seeds)
    part = Part.parse(shard)
    if address is not None and engine is not Engine.RAY:
        raise ConfigError(
            f"--address {address} names a Ray cluster, and this build runs here.",
            hint="Add --engine ray.",
        )
    run = _build_here if engine is Engine.LOCAL else _build_on_ray
    with ProgressDisplay() as display:
        result = run(config, chosen, part, display, address)
    committed = result["shards_committed"]
    emit(
        result,
        as_json=json,
        text=f"{config.cache}: {committed} shards recorded, seeds {describe_seeds(chosen)} "
        f"{'done' if part.count == 1 else f'part {part.index}/{part.count} done'}",
    )


def _build_here(
    config: BuildConfig,
    seeds: tuple[int, ...],
    part: Part,
    display: ProgressDisplay,
    _address: str | None,
) -> dict[str, Any]:
    from cache_service.recording.context import open_build
    from cache_service.recording.engines import prepare, run_local

    opened = open_build(config)
    prepare(opened, on_message=display.show_message)
    committed = run_local(opened, seeds=seeds, part=part, on_progress=_progress_on(display))
    return _build_result(config, seeds, opened.spec.fingerprint, committed)


def _build_on_ray(
    config: BuildConfig,
    seeds: tuple[int, ...],
    part: Part,
    display: ProgressDisplay,
    address: str | None,
) -> dict[str, Any]:
    from cache_service.recording.ray_engine import run_ray

    done = run_ray(
        config,
        seeds=seeds,
        part=part,
        address=address,
        on_message=display.show_message,
        on_progress=_progress_on(display),
    )
    result = _build_result(config, seeds, done.fingerprint, done.committed)
    return result | {"deaths": done.deaths}


def _build_result(
    config: BuildConfig, seeds: tuple[int, ...], fingerprint: str, committed: int
) -> dict[str, Any]:
    return {
        "cache": config.cache,
        "fingerprint": fingerprint,
        "seeds": list(seeds),
        "shards_committed": committed,
    }


def _progress_on(display: ProgressDisplay) -> OnProgress:
    """Show a progress bar if stderr is a terminal, otherwise an event per committed shard."""
    shards_shown = 0

    def show(progress: Progress) -> None:
        nonlocal shards_shown
        if display.is_terminal:
            display.update_bar(
                title=f"seed {progress.seed}",
                completed=progress.rows_done,
                total=progress.rows_total,
                details=f"views  {progress.rows_per_s:,.0f}/s  "
                f"{human_bytes(progress.bytes_written)}  "
                f"{progress.shards_done}/{progress.shards_total} shards",
            )
        elif progress.shards_done != shards_shown:
            shards_shown = progress.shards_done
            display.write_event({"event": "shard", **asdict(progress), "eta_s": progress.eta_s})

    return show
