"""Runs a build on a Ray cluster: one teacher an actor, and shards handed out as they are needed.

A dispatcher gives out the next shard to whoever is free, so that a slow machine holds up no other.
An actor that dies is started again by Ray, and its shards are handed out again. The driver loads no
teacher: a machine without a GPU can start a build for machines with one.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache_service.errors import ConfigError, KdCacheError, RowsNotBuiltError, StorageError
from cache_service.format.spec import CacheSpec
from cache_service.interrupts import stop_on_signal
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.shards import (
    OnProgress,
    Part,
    Progress,
    Shard,
    ShardOrder,
    all_shards,
    not_recorded,
    num_rows,
)
from cache_service.rows.reader import open_cache
from cache_service.storage import is_url, open_storage

POLL_S = 0.5
"""Interval between looks at the actors, seconds."""

REPORT_S = 0.5
"""Smallest interval between an actor's reports, seconds."""

CONNECT_S = 5.0
"""Time for the head of a cluster to accept a connection, seconds."""

STOP_S = 20.0
"""Time for the actors to commit the shards that they are writing, after Ctrl-C, seconds."""

MAX_DEATHS = 5
"""Deaths of an actor without a commit between them, after which the build ends."""


class RayResult(NamedTuple):
    """What a build on Ray did.

    Attributes:
        fingerprint: of the cache.
        committed: shards that are recorded now and were not before.
        deaths: actors that died and were started again.
    """

    fingerprint: str
    committed: int
    deaths: int


class Prepared(NamedTuple):
    """What the first task found: the spec of the build, and where it recorded it."""

    spec: CacheSpec
    place: str
    messages: tuple[str, ...]


def run_ray(
    config: BuildConfig,
    *,
    seeds: tuple[int, ...],
    part: Part,
    address: str | None = None,
    on_message: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress = lambda _: None,
) -> RayResult:
    """Record a part of a build on a Ray cluster, by `config.processes` actors.

    Relative paths mean the folder of this process, whatever folder the actors start in. At the end
    the driver reads the commits itself, so that a cache that was recorded elsewhere is not reported
    as recorded.

    Args:
        config: the build file.
        seeds: seeds to record.
        part: part of the shards to record.
        address: address of the cluster; None for `RAY_ADDRESS`, or else a cluster of this machine
            for the time of the build.
        on_message: called with lines about the teacher.
        on_progress: called with the progress of all actors together.

    Raises:
        ConfigError: Ray is not installed, or there is no such cluster.
        RowsNotBuiltError: commits of the actors cannot be seen here.
        KeyboardInterrupt: Ctrl-C or SIGTERM was received. Committed shards stay valid.
        KdCacheError: whatever an actor refuses.
    """
    # Ray prints what its processes print, and their deaths, to stdout: the place of the result.
    with contextlib.redirect_stdout(sys.stderr), _connected(config, address) as ray:
        placed = _place(_of_actor(config))
        cache = placed.config.cache
        resources = _resources(config, ray.cluster_resources())
        prepare_task = ray.remote(**resources, max_retries=MAX_DEATHS)(_prepare)
        prepared: Prepared = _get(ray, prepare_task.remote(placed))
        for line in prepared.messages:
            on_message(line)
        mine = part.select(all_shards(prepared.spec, seeds))
        before = _missing(cache, mine, prepared)
        left, deaths = before, 0

        def on_death(number: int) -> None:
            on_message(f"processes that died and were started again: {deaths + number}")

        try:
            while left:
                actors = _Round(ray, placed, prepared.spec, resources, left, config.processes)
                deaths += actors.work(on_progress, on_death, done=len(mine) - len(left), total=mine)
                now = _missing(cache, mine, prepared)
                if len(now) == len(left):
                    raise _unseen(cache, prepared, now)
                left = now
        finally:
            open_storage(cache).sweep()  # what killed processes left behind
    return RayResult(prepared.spec.fingerprint, len(before), deaths)


@contextlib.contextmanager
def _connected(config: BuildConfig, address: str | None) -> Iterator[Any]:
    """Connect to a cluster, or start one of this machine that ends with the build."""
    try:
        import ray
    except ImportError as missing:
        raise ConfigError(
            "--engine ray: Ray is not installed.", hint="pip install 'kd-cache[ray]'"
        ) from missing
    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"runtime_env": _runtime_env(config), "log_to_driver": False}
    where = address or os.environ.get("RAY_ADDRESS")
    if where:
        _require_open(where)
    # Without an address Ray would join whatever cluster this machine started last, running or not.
    options |= {"address": where or "local"} | ({} if where else {"include_dashboard": False})
    try:
        with _silent_stderr():
            ray.init(**options)
    except Exception as problem:
        raise _no_connection(where or "this machine", problem) from problem
    try:
        yield ray
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Discard what Ray prints while it connects; of a wrong token it prints 20 lines from C++.

    They are in Ray's logs, and the exception has the reason.
    """
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


def _require_open(address: str) -> None:
    """Refuse an address at which nothing listens; Ray would try for minutes.

    Raises:
        ConfigError: nothing listens there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # `auto` and `local`, which Ray resolves itself
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as problem:
        raise _no_connection(address, problem) from problem


def _no_connection(where: str, problem: Exception) -> ConfigError:
    return ConfigError(
        f"--engine ray: no connection to a cluster at {where}: {_first_line(problem)}.",
        hint="Name the address of a running head with --address HOST:6379, and set "
        "RAY_AUTH_TOKEN as the cluster does.",
    )


def _runtime_env(config: BuildConfig) -> dict[str, Any]:
    """What Ray carries to the actors: folders of the user's modules, named variables."""
    settings = config.ray
    # Not all of sys.path: the libraries of this machine must not hide those of another one.
    listed = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    folders = [str(Path(each).absolute()) for each in (".", *listed)]
    chosen = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(folders))}
    missing = [name for name in settings.env if name not in os.environ]
    if missing:
        raise ConfigError(
            f"ray.env names {', '.join(missing)}, which this machine's environment does not have.",
            hint="Set the variable, or leave it out of ray.env.",
        )
    chosen |= {name: os.environ[name] for name in settings.env}
    env: dict[str, Any] = {"env_vars": chosen}
    if settings.working_dir is not None:
        env["working_dir"] = settings.working_dir
        del chosen["PYTHONPATH"]  # its folders are those of this machine
    return env


def _resources(config: BuildConfig, cluster: dict[str, float]) -> dict[str, float]:
    """CPUs and GPUs of an actor: of the build file, else one GPU where the cluster has any."""
    settings = config.ray
    wants_gpu = config.device.startswith("cuda") or (
        config.device == "auto" and cluster.get("GPU", 0) > 0
    )
    num_gpus = settings.num_gpus if settings.num_gpus is not None else float(wants_gpu)
    num_cpus = settings.num_cpus if settings.num_cpus is not None else 1 + (config.workers or 0)
    for name, wanted in (("GPU", num_gpus), ("CPU", num_cpus)):
        if wanted > cluster.get(name, 0):
            raise ConfigError(
                f"--engine ray: each process needs {wanted:g} {name}s, and the whole cluster has "
                f"{cluster.get(name, 0):g}.",
                hint=f"Set ray.num_{name.lower()}s, or `device: cpu` for a cluster without GPUs.",
            )
    return {"num_cpus": num_cpus, "num_gpus": num_gpus}


class Placed(NamedTuple):
    """A build file and the folder of the driver, from which its relative paths are meant.

    Attributes:
        config: the build file as written, for machines that have the folder: what a cache keeps
            about its dataset and teacher is then what any engine keeps.
        absolute: the same with absolute paths, for machines that do not.
        folder: the driver's current folder.
    """

    config: BuildConfig
    absolute: BuildConfig
    folder: str

    def enter(self) -> BuildConfig:
        """Make the folder the current one where it exists. Returns the file to use."""
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
            return self.config
        return self.absolute


def _place(config: BuildConfig) -> Placed:
    if not is_url(config.cache):
        config = config.model_copy(update={"cache": _absolute_path(config.cache)})
    dataset, teacher = config.dataset, config.teacher
    classes = teacher.classes
    files = {
        "checkpoint": _absolute_path(teacher.checkpoint),
        "classes": _absolute_path(classes) if isinstance(classes, str) else classes,
    }
    absolute = config.model_copy(
        update={
            "dataset": dataset.model_copy(update={"root": _absolute_path(dataset.root)}),
            "teacher": teacher.model_copy(update=files),
        }
    )
    return Placed(config, absolute, str(Path.cwd()))


def _absolute_path(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())


def _of_actor(config: BuildConfig) -> BuildConfig:
    """The build file of one actor: one process, and as many renderers as it has CPUs for."""
    cpus, workers = config.ray.num_cpus, config.workers
    if workers is None:
        workers = 0 if cpus is None else max(int(cpus) - 1, 0)
    return config.model_copy(update={"processes": 1, "workers": workers})


def _prepare(placed: Placed) -> Prepared:
    """Open the build where the teacher is, check it, and create or extend the cache."""
    from cache_service.recording.context import open_build
    from cache_service.recording.engines import prepare

    messages: list[str] = []
    config = placed.enter()
    build = open_build(config)
    prepare(build, on_message=messages.append)
    return Prepared(build.spec, f"{config.cache} on {socket.gethostname()}", tuple(messages))


def _missing(url: str, mine: list[Shard], prepared: Prepared) -> list[Shard]:
    """Shards without a commit, as this machine sees the cache.

    Raises:
        RowsNotBuiltError: there is no such cache here.
    """
    try:
        cache = open_cache(url)
        if cache.fingerprint != prepared.spec.fingerprint:
            raise _unseen(url, prepared, mine)
        return not_recorded(cache.storage, prepared.spec, mine)
    except RowsNotBuiltError:
        raise
    except KdCacheError as problem:
        raise _unseen(url, prepared, mine) from problem


def _unseen(url: str, prepared: Prepared, shards: Sequence[Shard]) -> RowsNotBuiltError:
    return RowsNotBuiltError(
        f"{len(shards)} shards were recorded into {prepared.place}, and {url} on "
        f"{socket.gethostname()} does not have them.",
        hint="Name a cache that every machine of the cluster reaches by the same path: a shared "
        "folder or s3://bucket/prefix.",
    )


class _Round:
    """Actors that record the shards of one round."""

    def __init__(
        self,
        ray: Any,
        placed: Placed,
        spec: CacheSpec,
        resources: dict[str, float],
        shards: list[Shard],
        processes: int,
    ) -> None:
        self._ray = ray
        self._spec = spec
        self._shards = shards
        self._dispatcher = ray.remote(num_cpus=0)(Dispatcher).remote(shards)
        actor = ray.remote(**resources, max_restarts=-1, max_task_retries=-1)(Recorder)
        # More processes than shards would load teachers for nothing.
        count = min(processes, len(shards))
        self._actors = [actor.remote(placed, number) for number in range(count)]

    def work(
        self,
        on_progress: OnProgress,
        on_death: Callable[[int], None],
        *,
        done: int,
        total: list[Shard],
    ) -> int:
        """Record until no shard is left and every actor that had one has ended.

        Returns the number of deaths; `on_death` is called with it when it grows.
        """
        ray, deaths = self._ray, 0
        running = [each.work.remote(self._dispatcher) for each in self._actors]
        rows_before = num_rows(self._spec, total) - num_rows(self._spec, self._shards)
        try:
            with stop_on_signal() as stop:
                while running:
                    ready, running = ray.wait(running, timeout=POLL_S)
                    for each in ready:
                        _get(ray, each)
                    status: Status = _get(ray, self._dispatcher.status.remote())
                    if status.deaths > deaths:
                        deaths = status.deaths
                        on_death(deaths)
                    on_progress(
                        _sum(
                            status,
                            rows=(rows_before, num_rows(self._spec, total)),
                            shards=(done, len(total)),
                        )
                    )
                    if stop.requested:
                        raise KeyboardInterrupt
                    if status.is_finished:
                        running = []  # of actors for which the cluster had no room
            return deaths
        finally:
            if running:
                with contextlib.suppress(Exception):  # the cluster may be gone
                    ray.get(self._dispatcher.stop.remote(), timeout=STOP_S)
                    ray.wait(running, num_returns=len(running), timeout=STOP_S)
            for actor in self._actors:
                ray.kill(actor)


class Status(NamedTuple):
    """What the dispatcher knows.

    Attributes:
        is_finished: whether every shard was handed out to an actor that has ended.
        reports: the latest progress of every actor.
        lost: the last progress of every life of an actor that died.
        deaths: starts beyond the first of every actor.
    """

    is_finished: bool
    reports: list[Progress]
    lost: list[Progress]
    deaths: int


class Dispatcher:
    """Hands out shards, and again those of an actor that died. Runs as an actor of its own."""

    def __init__(self, shards: list[Shard]) -> None:
        self._left = list(shards)
        self._taken: dict[int, list[Shard]] = {}
        self._starts: dict[int, int] = {}
        self._deaths_in_a_row: dict[int, int] = {}
        self._reports: dict[int, Progress] = {}
        self._lost: list[Progress] = []
        self._stopped = False

    def begin(self, actor: int) -> list[Shard]:
        """Note that an actor starts; take back what it had before it died.

        Returns the shards that are left, for an estimate of the work.

        Raises:
            StorageError: it has died too often without a commit.
        """
        self._starts[actor] = self._starts.get(actor, 0) + 1
        report = self._reports.pop(actor, None)
        if report is not None:
            self._lost.append(report)
        if self._starts[actor] > 1:
            idle = report is None or report.shards_committed == 0
            self._deaths_in_a_row[actor] = self._deaths_in_a_row.get(actor, 0) * idle + 1
            if self._deaths_in_a_row[actor] >= MAX_DEATHS:
                raise StorageError(
                    f"process {actor} of the build died {MAX_DEATHS} times without committing a "
                    "shard.",
                    hint="Look at the logs of the cluster: most often its machine has too little "
                    "memory. `--engine local` shows what happens.",
                )
        self._left = self._taken.pop(actor, []) + self._left
        return list(self._left)

    def take(self, actor: int) -> Shard | None:
        """The next shard for an actor; None if there is none, or the build stops."""
        if self._stopped or not self._left:
            return None
        shard = self._left.pop(0)
        self._taken.setdefault(actor, []).append(shard)
        return shard

    def note(self, actor: int, progress: Progress) -> bool:
        """Keep an actor's progress. Returns whether the build stops."""
        self._reports[actor] = progress
        return self._stopped

    def end(self, actor: int) -> None:
        """Note that an actor has committed what it took."""
        self._taken.pop(actor, None)

    def status(self) -> Status:
        """How far the build is."""
        return Status(
            is_finished=not self._left and not self._taken,
            reports=list(self._reports.values()),
            lost=list(self._lost),
            deaths=sum(self._starts.values()) - len(self._starts),
        )

    def stop(self) -> None:
        """Hand out no more shards."""
        self._stopped = True


class Recorder:
    """Loads the teacher once, and records the shards that the dispatcher hands out."""

    def __init__(self, placed: Placed, number: int) -> None:
        self._placed = placed
        self._number = number

    def work(self, dispatcher: Any) -> None:
        """Record until no shard is left. Ray calls this again after a death.

        Raises:
            KdCacheError: whatever recording refuses.
        """
        import ray

        from cache_service.recording.comparison import check_teacher
        from cache_service.recording.context import open_build
        from cache_service.recording.record import open_writer, record_handed_out

        left: list[Shard] = ray.get(dispatcher.begin.remote(self._number))
        build = open_build(self._placed.enter())
        check_teacher(build)  # another machine may have a different checkpoint at the same path
        next_report = 0.0
        committed = -1

        def report(progress: Progress) -> None:
            nonlocal next_report, committed
            now = time.monotonic()
            if now < next_report and progress.shards_committed == committed:
                return
            next_report, committed = now + REPORT_S, progress.shards_committed
            if ray.get(dispatcher.note.remote(self._number, progress)):
                raise KeyboardInterrupt

        order = _HandedOut(lambda: ray.get(dispatcher.take.remote(self._number)))
        with contextlib.suppress(KeyboardInterrupt):  # the driver knows that it stops
            record_handed_out(build, open_writer(build), order, left, on_progress=report)
            ray.get(dispatcher.end.remote(self._number))


class _HandedOut(ShardOrder):
    """An order that asks for every next shard."""

    def __init__(self, take: Callable[[], Shard | None]) -> None:
        super().__init__()
        self._take = take

    def through(self, _shards: Any) -> Iterator[Shard]:
        """Yield shards until none is handed out."""
        while (shard := self._take()) is not None:
            yield Shard(*shard)


def _sum(status: Status, *, rows: tuple[int, int], shards: tuple[int, int]) -> Progress:
    """The progress of all actors; rows and shards as (recorded before, total).

    What the teacher answered for shards that were open when an actor died is lost.
    """
    reports = [*status.lost, *status.reports]
    committed = sum(each.shards_committed for each in reports)
    per_shard = (rows[1] - rows[0]) / max(shards[1] - shards[0], 1)
    rows_done = min(rows[0] + round(committed * per_shard), rows[1])
    rows_open = sum(each.rows_answered - each.rows_done for each in status.reports)
    latest = max(reports, key=lambda each: (each.seed, each.shard), default=Progress())
    return Progress(
        seed=latest.seed,
        shard=latest.shard,
        rows_done=rows_done,
        rows_answered=min(rows_done + rows_open, rows[1]),
        rows_total=rows[1],
        shards_done=shards[0] + committed,
        shards_total=shards[1],
        shards_committed=committed,
        bytes_written=sum(each.bytes_written for each in reports),
        rows_per_s=sum(each.rows_per_s for each in status.reports),
    )


def _get(ray: Any, reference: Any) -> Any:
    """The result of a task, or the error of this project that it raised."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as problem:
        if isinstance(problem.cause, KdCacheError):
            raise problem.cause from problem
        if isinstance(problem.cause, ray.exceptions.RayError):
            raise _lost(problem.cause) from problem
        raise
    except ray.exceptions.RayError as problem:
        raise _lost(problem) from problem


def _lost(problem: BaseException) -> StorageError:
    return StorageError(
        f"a process of the build was lost: {_first_line(problem)}",
        hint="Run the same command again: it goes on from what is committed.",
    )


def _first_line(problem: BaseException) -> str:
    return next(iter(str(problem).strip().splitlines()), type(problem).__name__)
