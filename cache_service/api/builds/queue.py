"""The queue of builds in SQLite: requests, who runs them, and how far they are. Survives any kill.

Several servers may share one database on one machine. A claim is one transaction, so exactly one
server gets a build. Each server holds a file lock for as long as it lives, so a build of a server
that is gone is queued again at once, without comparing clocks (see docs/decisions/006 and 015).
"""

from __future__ import annotations

import json
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, Field, ValidationError

from cache_service.api.builds.request import BuildRequest
from cache_service.config import Frozen
from cache_service.errors import (
    ConfigError,
    KdCacheError,
    OutOfSpaceError,
    SpecMismatchError,
    StorageError,
)
from cache_service.format.canonical import canonical_json
from cache_service.format.seeds import describe_seeds
from cache_service.human_format import human_seconds
from cache_service.recording.shards import Shard
from cache_service.rows.writer import first_difference
from cache_service.storage.local import LocalStorage

BUSY_S = 10.0
"""How long a transaction waits for one of another server. Transactions take milliseconds."""

State = Literal["queued", "running", "done", "failed", "canceled"]

FINAL: tuple[State, ...] = ("done", "failed", "canceled")
"""States that a build does not leave. The same request again makes a new build, which resumes."""


class NoSuchBuildError(KdCacheError):
    """No build of this server has that id."""

    code = "no_such_build"
    http_status = 404
    exit_code = 2


class QueueFullError(KdCacheError):
    """As many builds wait as the server's configuration allows."""

    code = "queue_full"
    http_status = 429
    exit_code = 4
    retry_after_s = 30


class BuildProgress(Frozen):
    """How far a build is; see `cache_service.recording.shards.Progress`."""

    rows_done: Annotated[int, Field(description="Recorded, by this run and those before.")]
    rows_answered: Annotated[
        int, Field(description="Answered by the teacher; ahead of rows_done by open shards.")
    ] = 0
    rows_total: int
    shards_done: int
    shards_total: int
    shards_committed: Annotated[int, Field(description="By this run.")]
    bytes_written: Annotated[int, Field(description="By this run, uncompressed.")]
    rows_per_s: Annotated[float, Field(description="Answered by the teacher in this run.")]
    eta_s: Annotated[float | None, Field(description="Seconds left at the present rate.")]


class BuildError(Frozen):
    """Why a build failed: the error that `kd-cache build` would have shown."""

    code: str
    status: Annotated[int, Field(description="HTTP status of the code.")]
    detail: str
    hint: str


class Build(Frozen):
    """A build, as it is stored and as clients see it. Times are Unix times in seconds."""

    id: str
    state: State
    cache: str
    teacher: str
    dataset: str
    seeds: Annotated[str, Field(description="As people write them, such as 0:8, 12:13.")]
    priority: int
    canceling: Annotated[
        bool, Field(description="Asked to end; its present shard is finished first.")
    ]
    device: Annotated[str | None, Field(description="Where it runs or ran last.")]
    request: BuildRequest
    progress: BuildProgress | None
    error: BuildError | None
    created_s: float
    started_s: float | None
    finished_s: float | None
    version: Annotated[int, Field(description="Counts the changes of this build.")]

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in FINAL


class Place(NamedTuple):
    """Where a build is: `number` of `queued` waiting ones, counted from 1; 0 if it runs."""

    build: Build
    number: int
    queued: int

    def __str__(self) -> str:
        """One sentence for whoever waits for its rows."""
        build, progress = self.build, self.build.progress
        if self.number:
            return f"Build {build.id} is number {self.number} of {self.queued} in the queue."
        if progress is None:
            return f"Build {build.id} has just started."
        left = "" if progress.eta_s is None else f", about {human_seconds(progress.eta_s)} left"
        done = f"{progress.rows_done:,} of {progress.rows_total:,} rows"
        return f"Build {build.id} is running: {done}{left}."


SCHEMA_VERSION = 1

TABLES = (
    """
    CREATE TABLE builds (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        id TEXT NOT NULL UNIQUE,
        state TEXT NOT NULL
            CHECK (state IN ('queued', 'running', 'done', 'failed', 'canceled')),
        cache TEXT NOT NULL,
        request TEXT NOT NULL,
        priority INTEGER NOT NULL,
        canceling INTEGER NOT NULL DEFAULT 0,
        owner TEXT,
        device TEXT,
        progress TEXT,
        error TEXT,
        created_s REAL NOT NULL,
        started_s REAL,
        finished_s REAL,
        version INTEGER NOT NULL DEFAULT 1
    )
    """,
    "CREATE INDEX builds_by_state ON builds (state, cache)",
    """
    CREATE TABLE awaited (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        build TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
        seed INTEGER NOT NULL,
        shard INTEGER NOT NULL,
        UNIQUE (build, seed, shard)
    )
    """,
)

IN_TURN = """
    ORDER BY EXISTS (SELECT 1 FROM awaited WHERE build = builds.id) DESC, priority DESC, number
"""
"""See `BuildQueue.claim`. The table `awaited` holds the prioritized shards."""

NEXT_BUILD = f"""
    SELECT id FROM builds
    WHERE state = 'queued'
      AND cache NOT IN (SELECT cache FROM builds WHERE state = 'running')
      AND NOT EXISTS (SELECT 1 FROM builds WHERE state = 'running' AND device = ?)
    {IN_TURN} LIMIT 1
"""  # noqa: S608  words of this file

ACTIVE = "SELECT * FROM builds WHERE state IN ('queued', 'running')"

FORGET = """
    DELETE FROM builds
    WHERE state IN ('done', 'failed', 'canceled') AND number NOT IN (
        SELECT number FROM builds WHERE state IN ('done', 'failed', 'canceled')
        ORDER BY number DESC LIMIT ?
    )
"""

GIVE_BACK = """
    UPDATE builds SET owner = NULL, version = version + 1,
        state = CASE canceling WHEN 1 THEN 'canceled' ELSE 'queued' END,
        finished_s = CASE canceling WHEN 1 THEN ? END
    WHERE owner = ? AND state = 'running'
"""


class BuildQueue:
    """The queue, opened by one server. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Open the database, or create it.

        Raises:
            ConfigError: a newer version of this program created it, or it is not a database.
            StorageError, OutOfSpaceError: it cannot be written.
        """
        self.owner = uuid.uuid4().hex
        self._path = path
        self._lock = threading.Lock()
        # Fields by build that could not be written yet: on a full disk, rows still say `running`.
        self._unwritten: dict[str, dict[str, Any]] = {}
        self._server_locks = LocalStorage(str(path.parent))
        assert self._server_locks.begin(_lock_name(self.owner))
        try:
            with self._errors():
                self._database = sqlite3.connect(
                    path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
                )
        except BaseException:
            self._release_lock()
            raise
        try:
            with self._errors():
                _configure(self._database)
            with self._transaction() as database:
                version = _create_tables(database)
            if version != SCHEMA_VERSION:
                raise ConfigError(
                    f"the builds database {path.name} has version {version}; this program knows "
                    f"version {SCHEMA_VERSION}.",
                    hint="Update kd-cache, or set builds.database to another file.",
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the database and release what this server still owns."""
        with self._lock:
            self._database.close()
        self._release_lock()

    def submit(self, request: BuildRequest, *, max_queued: int, max_kept: int) -> Build:
        """Queue a build. An equal active build is returned instead, with the higher priority.

        Raises:
            SpecMismatchError: the cache is queued with other settings; names the first.
            QueueFullError: too many builds wait.
        """
        with self._transaction() as database:
            database.execute(FORGET, (max_kept,))
            num_waiting = 0
            for row in database.execute(ACTIVE):
                build = self._build(row)
                if build.is_final:
                    continue
                num_waiting += build.state == "queued"
                if build.cache == request.cache and not build.canceling:
                    _check_same_settings(build, request)
                    if build.request.seeds == request.seeds:
                        database.execute(
                            "UPDATE builds SET priority = max(priority, ?), version = version + 1 "
                            "WHERE id = ?",
                            (request.priority, build.id),
                        )
                        return self._get(database, build.id)
            if num_waiting >= max_queued:
                raise QueueFullError(
                    f"{num_waiting} builds wait, and this server does not accept more.",
                    hint="Try again when one of them is done.",
                )
            new = uuid.uuid4().hex[:16]
            database.execute(
                "INSERT INTO builds (id, state, cache, request, priority, created_s) "
                "VALUES (?, 'queued', ?, ?, ?, ?)",
                (new, request.cache, _json(request), request.priority, time.time()),
            )
            return self._get(database, new)

    def get(self, build: str) -> Build:
        """A build by id. Raises NoSuchBuildError."""
        with self._reading() as database:
            return self._get(database, build)

    def newest(self, *, limit: int = 100) -> list[Build]:
        """Builds, the newest first."""
        with self._reading() as database:
            rows = database.execute("SELECT * FROM builds ORDER BY number DESC LIMIT ?", (limit,))
            return [self._build(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Number of builds by state."""
        with self._reading() as database:
            rows = database.execute("SELECT state, count(*) FROM builds GROUP BY state")
            return {str(state): int(count) for state, count in rows}

    def claim(self, device: str) -> Build | None:
        """Take the next build for a device; None if there is none for it.

        Builds with prioritized shards go first, then those of the highest priority, then the
        oldest. One build at a time runs on a device, whichever server owns it, and one at a time
        writes a cache.
        """
        with self._reading() as database:
            if database.execute(NEXT_BUILD, (device,)).fetchone() is None:
                return None  # without taking the write lock once a second
        with self._transaction() as database:
            row = database.execute(NEXT_BUILD, (device,)).fetchone()
            if row is None:
                return None
            database.execute(
                "UPDATE builds SET state = 'running', owner = ?, device = ?, started_s = ?, "
                "version = version + 1 WHERE id = ?",
                (self.owner, device, time.time(), row["id"]),
            )
            return self._get(database, row["id"])

    def set_progress(self, build: str, progress: BuildProgress) -> None:
        """Store how far a build of this server is."""
        self._unwritten.setdefault(build, {})["progress"] = progress
        self._update(build, "progress = ?", _json(progress))
        del self._unwritten[build]

    def finish(self, build: str, state: State, error: BuildError | None = None) -> None:
        """End a build of this server.

        If that cannot be written, the build has ended all the same, as far as this server tells;
        call this again until it can.
        """
        told = self._unwritten.setdefault(build, {})
        told |= {"state": state, "error": error}
        end_s = told.setdefault("finished_s", time.time())
        progress = _json(told["progress"]) if "progress" in told else None
        self._update(
            build,
            "progress = coalesce(?, progress), state = ?, error = ?, finished_s = ?",
            progress,
            state,
            None if error is None else _json(error),
            end_s,
        )
        del self._unwritten[build]
        with self._transaction() as database:
            database.execute("DELETE FROM awaited WHERE build = ?", (build,))

    def requeue(self, build: str) -> None:
        """Give a build of this server back to the queue; it resumes later."""
        self._update(build, "state = 'queued', owner = NULL")

    def cancel(self, build: str) -> Build:
        """End a queued build, or ask the server that runs it to end it. Raises NoSuchBuildError."""
        with self._transaction() as database:
            present = self._get(database, build)
            if present.state == "queued":
                database.execute(
                    "UPDATE builds SET state = 'canceled', finished_s = ?, version = version + 1 "
                    "WHERE id = ?",
                    (time.time(), build),
                )
            elif present.state == "running" and not present.canceling:
                database.execute(
                    "UPDATE builds SET canceling = 1, version = version + 1 WHERE id = ?", (build,)
                )
            return self._get(database, build)

    def prioritize(self, cache: str, seed: int, shards: Sequence[int]) -> bool:
        """Have shards recorded before others of their build, and their build before other builds.

        Returns whether an active build will record one of them.
        """
        entries: list[tuple[str, int, int]] = []
        with self._reading() as database:
            rows = database.execute(f"{ACTIVE} AND cache = ?", (cache,))
            for build in map(_build_of, rows.fetchall()):
                if seed in build.request.seeds:
                    entries += [(build.id, seed, shard) for shard in shards]
            known = {
                tuple(row)
                for build_id in {build_id for build_id, _, _ in entries}
                for row in database.execute(
                    "SELECT build, seed, shard FROM awaited WHERE build = ?", (build_id,)
                )
            }
        new = [entry for entry in entries if entry not in known]
        if new:  # polling clients repeat themselves: most calls do not take the write lock
            with self._transaction() as database:
                database.executemany(
                    "INSERT OR IGNORE INTO awaited (build, seed, shard) VALUES (?, ?, ?)", new
                )
        return bool(entries)

    def prioritized(self, build: str, *, after: int = 0) -> list[tuple[int, Shard]]:
        """Prioritized shards of a build, oldest first, each with the number to continue after."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT number, seed, shard FROM awaited WHERE build = ? AND number > ? "
                "ORDER BY number",
                (build, after),
            )
            return [(number, Shard(seed, shard)) for number, seed, shard in rows]

    def place(self, cache: str, seed: int | None = None) -> Place | None:
        """Where the build of a cache is that records a seed (any, if None); None without one."""
        with self._reading() as database:
            rows = database.execute(f"{ACTIVE} {IN_TURN}").fetchall()
        active = [build for row in rows if not (build := self._build(row)).is_final]
        queued = [build.id for build in active if build.state == "queued"]
        found = [
            build
            for build in active
            if build.cache == cache
            and not build.canceling
            and (seed is None or seed in build.request.seeds)
        ]
        if not found:
            return None
        build = min(found, key=lambda each: each.state != "running")
        number = queued.index(build.id) + 1 if build.id in queued else 0
        return Place(build, number, len(queued))

    def recover(self) -> int:
        """Queue again what servers that are gone were running. Returns how many builds."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT DISTINCT owner FROM builds WHERE state = 'running' AND owner != ?",
                (self.owner,),
            )
            owners = [str(owner) for (owner,) in rows]
        count = 0
        for owner in owners:
            if not self._server_locks.begin(_lock_name(owner)):
                continue  # the lock is held, so that server is alive
            try:
                with self._transaction() as database:
                    count += database.execute(GIVE_BACK, (time.time(), owner)).rowcount
            finally:
                self._server_locks.end(_lock_name(owner))
        return count

    def _release_lock(self) -> None:
        self._server_locks.end(_lock_name(self.owner))
        self._server_locks.sweep()

    def _update(self, build: str, changes: str, *values: Any) -> None:
        with self._transaction() as database:
            database.execute(
                f"UPDATE builds SET {changes}, version = version + 1 "  # noqa: S608  words of this file
                "WHERE id = ? AND owner = ? AND state = 'running'",
                (*values, build, self.owner),
            )

    def _get(self, database: sqlite3.Connection, build: str) -> Build:
        row = database.execute("SELECT * FROM builds WHERE id = ?", (build,)).fetchone()
        if row is None:
            raise NoSuchBuildError(
                "this server has no build of that id.", hint="GET /v1/builds lists them."
            )
        return self._build(row)

    def _build(self, row: sqlite3.Row) -> Build:
        """The build of a row, with what could not be written of it."""
        build, unwritten = _build_of(row), self._unwritten.get(row["id"])
        if unwritten is not None and build.state == "running":
            build = build.model_copy(update={**unwritten, "version": build.version + 1})
        if build.state == "running" or build.progress is None:
            return build
        # What the teacher answered for shards that were open is lost, and no rate tells the end.
        ended = {"rows_answered": build.progress.rows_done, "eta_s": None}
        return build.model_copy(update={"progress": build.progress.model_copy(update=ended)})

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            yield self._database

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:  # on a full disk SQLite has rolled back already
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as problem:
            message = f"the builds database {self._path.name} cannot be used: {problem}."
            code = getattr(problem, "sqlite_errorcode", None)
            if code == sqlite3.SQLITE_FULL:
                raise OutOfSpaceError(message, hint="Free some space and ask again.") from problem
            if code == sqlite3.SQLITE_NOTADB:
                raise ConfigError(message, hint="Set builds.database to another file.") from problem
            raise StorageError(message) from problem
        except ValidationError as problem:
            raise StorageError(
                f"the builds database {self._path.name} holds a build that this program does not "
                "understand.",
                hint="Set builds.database to another file.",
            ) from problem


def _configure(database: sqlite3.Connection) -> None:
    """Commits survive a power cut, and readers never wait."""
    database.row_factory = sqlite3.Row
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA foreign_keys = ON")


def _create_tables(database: sqlite3.Connection) -> int:
    """Create the tables if there are none, inside a transaction. Returns the schema's version."""
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in TABLES:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return int(version) or SCHEMA_VERSION


def _build_of(row: sqlite3.Row) -> Build:
    request = BuildRequest.model_validate(json.loads(row["request"]))
    progress, error = row["progress"], row["error"]
    same = ("id", "state", "cache", "priority", "device", "created_s", "started_s", "finished_s")
    return Build(
        **{name: row[name] for name in same},
        teacher=request.teacher,
        dataset=request.dataset,
        seeds=describe_seeds(request.seeds),
        canceling=bool(row["canceling"]) and row["state"] == "running",
        request=request,
        progress=progress and BuildProgress.model_validate_json(progress),
        error=error and BuildError.model_validate_json(error),
        version=row["version"],
    )


def _check_same_settings(build: Build, request: BuildRequest) -> None:
    difference = first_difference(request.identity, build.request.identity)
    if difference is None:
        return
    field, requested, queued = difference
    raise SpecMismatchError(
        f"cache {request.cache} is {build.state} with {field} = {json.dumps(queued)}, but this "
        f"request has {field} = {json.dumps(requested)}.",
        hint="Name another cache, or cancel that build.",
    )


def _json(model: BaseModel) -> str:
    return canonical_json(model.model_dump(mode="json")).decode()


def _lock_name(owner: str) -> str:
    return f"server-{owner}"
