"""The queue of builds in SQLite: what was asked, who runs it, how far it is. Survives any kill.

Several servers may share one database on one machine. A claim is one transaction, so exactly one
gets a build; and each server holds a file lock for as long as it lives, so that what a dead one
was running is queued again at once, without clocks (see docs/decisions/006 and 015).
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
from typing import Any

from pydantic import ValidationError

from cache_service.api.builds.errors import NoSuchBuildError, QueueFullError
from cache_service.api.builds.request import BuildRequest
from cache_service.api.builds.schema import (
    ACTIVE,
    FORGET,
    GIVE_BACK,
    NEXT_BUILD,
    SCHEMA_VERSION,
    build_of,
    make_tables,
    prepare,
)
from cache_service.api.builds.states import Build, BuildError, BuildProgress, State
from cache_service.errors import ConfigError, OutOfSpaceError, SpecMismatchError, StorageError
from cache_service.format.canonical import canonical_json
from cache_service.recording.jobs import Shard
from cache_service.storage.local import LocalStorage
from cache_service.writer import first_difference

BUSY_S = 10.0
"""How long a transaction waits for another server's. They take milliseconds."""


class BuildStore:
    """The queue, opened by one server. Safe to use from several threads."""

    def __init__(self, path: Path) -> None:
        """Open or make the database.

        Raises:
            ConfigError: a newer version made it, or it is no database.
            StorageError, OutOfSpaceError: it cannot be written.
        """
        self.owner = uuid.uuid4().hex
        self._path = path
        self._lock = threading.Lock()
        self._alive = LocalStorage(str(path.parent))
        assert self._alive.begin(_lock_name(self.owner))
        try:
            with self._errors():
                self._database = sqlite3.connect(
                    path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
                )
        except BaseException:
            self._leave()
            raise
        try:
            with self._errors():
                prepare(self._database)
            with self._transaction() as database:
                found = make_tables(database)
            if found != SCHEMA_VERSION:
                raise ConfigError(
                    f"the builds database {path.name} has version {found}; this program knows "
                    f"version {SCHEMA_VERSION}.",
                    hint="Update kd-cache, or set builds.database to another file.",
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the database and let go of what this server still owns."""
        with self._lock:
            self._database.close()
        self._leave()

    def submit(self, request: BuildRequest, *, max_queued: int, max_kept: int) -> Build:
        """Queue a build, or find the one that is the same but for its priority, and raise that.

        Raises:
            SpecMismatchError: the cache is queued with other settings; names the first.
            QueueFullError: too many wait.
        """
        with self._transaction() as database:
            database.execute(FORGET, (max_kept,))
            waiting = 0
            for row in database.execute(ACTIVE):
                found = build_of(row)
                waiting += found.state == "queued"
                if found.cache == request.cache and not found.canceling:
                    _refuse_other(found, request)
                    if found.request.seeds == request.seeds:
                        database.execute(
                            "UPDATE builds SET priority = max(priority, ?), version = version + 1 "
                            "WHERE id = ?",
                            (request.priority, found.id),
                        )
                        return self._get(database, found.id)
            if waiting >= max_queued:
                raise QueueFullError(
                    f"{waiting} builds wait, and this server takes no more.",
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
            return [build_of(row) for row in rows]

    def counts(self) -> dict[str, int]:
        """Number of builds by state."""
        with self._reading() as database:
            rows = database.execute("SELECT state, count(*) FROM builds GROUP BY state")
            return {str(state): int(count) for state, count in rows}

    def claim(self, device: str) -> Build | None:
        """Take the next build for a device; None where there is none for it.

        Awaited builds first, then by priority, then in the order of asking. One build at a time
        runs on a device, whoever owns it, and one at a time into a cache.
        """
        with self._reading() as database:
            if database.execute(NEXT_BUILD, (device,)).fetchone() is None:
                return None  # without taking the write lock, once a second
        with self._transaction() as database:
            found = database.execute(NEXT_BUILD, (device,)).fetchone()
            if found is None:
                return None
            database.execute(
                "UPDATE builds SET state = 'running', owner = ?, device = ?, started_s = ?, "
                "version = version + 1 WHERE id = ?",
                (self.owner, device, time.time(), found["id"]),
            )
            return self._get(database, found["id"])

    def note(self, build: str, progress: BuildProgress) -> None:
        """Store how far a build of this server is."""
        self._update(build, "progress = ?", _json(progress))

    def finish(self, build: str, state: State, error: BuildError | None = None) -> None:
        """End a build of this server."""
        stored = None if error is None else _json(error)
        self._update(build, "state = ?, error = ?, finished_s = ?", state, stored, time.time())
        with self._transaction() as database:
            database.execute("DELETE FROM awaited WHERE build = ?", (build,))

    def requeue(self, build: str) -> None:
        """Give a build of this server back to the queue; it resumes where it was."""
        self._update(build, "state = 'queued', owner = NULL")

    def cancel(self, build: str) -> Build:
        """End a queued build, or ask whoever runs it to end it. Raises NoSuchBuildError."""
        with self._transaction() as database:
            found = self._get(database, build)
            if found.state == "queued":
                database.execute(
                    "UPDATE builds SET state = 'canceled', finished_s = ?, version = version + 1 "
                    "WHERE id = ?",
                    (time.time(), build),
                )
            elif found.state == "running" and not found.canceling:
                database.execute(
                    "UPDATE builds SET canceling = 1, version = version + 1 WHERE id = ?", (build,)
                )
            return self._get(database, build)

    def await_shards(self, cache: str, shards: Sequence[Shard]) -> bool:
        """Note that somebody waits for shards. Returns whether a build will record one of them."""
        wanted: list[tuple[str, int, int]] = []
        with self._reading() as database:
            rows = database.execute(f"{ACTIVE} AND cache = ?", (cache,))
            for build in map(build_of, rows.fetchall()):
                seeds = set(build.request.seeds)
                wanted += [(build.id, *shard) for shard in shards if shard.seed in seeds]
            known = {
                tuple(row)
                for each in {build for build, _, _ in wanted}
                for row in database.execute(
                    "SELECT build, seed, shard FROM awaited WHERE build = ?", (each,)
                )
            }
        new = [entry for entry in wanted if entry not in known]
        if new:
            with self._transaction() as database:
                database.executemany(
                    "INSERT OR IGNORE INTO awaited (build, seed, shard) VALUES (?, ?, ?)", new
                )
        return bool(wanted)

    def is_wanted(self, cache: str) -> bool:
        """Whether a build that waits or runs is to record a cache."""
        with self._reading() as database:
            rows = database.execute(f"{ACTIVE} AND cache = ? AND NOT canceling", (cache,))
            return rows.fetchone() is not None

    def awaited(self, build: str, *, after: int = 0) -> list[tuple[int, Shard]]:
        """Awaited shards of a build in the order of asking, each with the number to go on from."""
        with self._reading() as database:
            rows = database.execute(
                "SELECT number, seed, shard FROM awaited WHERE build = ? AND number > ? "
                "ORDER BY number",
                (build, after),
            )
            return [(number, Shard(seed, shard)) for number, seed, shard in rows]

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
            if not self._alive.begin(_lock_name(owner)):
                continue  # the kernel says that its holder lives
            try:
                with self._transaction() as database:
                    count += database.execute(GIVE_BACK, (time.time(), owner)).rowcount
            finally:
                self._alive.end(_lock_name(owner))
        return count

    def _leave(self) -> None:
        self._alive.end(_lock_name(self.owner))
        self._alive.sweep()

    def _update(self, build: str, changes: str, *values: Any) -> None:
        with self._transaction() as database:
            database.execute(
                f"UPDATE builds SET {changes}, version = version + 1 "  # noqa: S608  words of this file
                "WHERE id = ? AND owner = ? AND state = 'running'",
                (*values, build, self.owner),
            )

    @staticmethod
    def _get(database: sqlite3.Connection, build: str) -> Build:
        row = database.execute("SELECT * FROM builds WHERE id = ?", (build,)).fetchone()
        if row is None:
            raise NoSuchBuildError(
                "this server has no build of that id.", hint="GET /v1/builds lists them."
            )
        return build_of(row)

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
                if self._database.in_transaction:  # on a full disk SQLite has rolled back itself
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as problem:
            said = f"the builds database {self._path.name} cannot be used: {problem}."
            if getattr(problem, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise OutOfSpaceError(said, hint="Free some space and ask again.") from problem
            if getattr(problem, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                raise ConfigError(said, hint="Set builds.database to another file.") from problem
            raise StorageError(said) from problem
        except ValidationError as problem:
            raise StorageError(
                f"the builds database {self._path.name} holds a build that this program does not "
                "understand.",
                hint="Set builds.database to another file.",
            ) from problem


def _refuse_other(found: Build, request: BuildRequest) -> None:
    difference = first_difference(request.identity, found.request.identity)
    if difference is None:
        return
    field, want, have = difference
    raise SpecMismatchError(
        f"cache {request.cache} is {found.state} with {field} = {json.dumps(have)}, but this "
        f"request has {field} = {json.dumps(want)}.",
        hint="Name another cache, or cancel that build.",
    )


def _json(model: BuildRequest | BuildProgress | BuildError) -> str:
    return canonical_json(model.model_dump(mode="json")).decode()


def _lock_name(owner: str) -> str:
    return f"server-{owner}"
