"""The tables of the builds database, and a row of them as a `Build`."""

from __future__ import annotations

import json
import sqlite3

from cache_service.api.builds.request import BuildRequest, describe
from cache_service.api.builds.states import Build, BuildError, BuildProgress

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

NEXT_BUILD = """
    SELECT id FROM builds
    WHERE state = 'queued'
      AND cache NOT IN (SELECT cache FROM builds WHERE state = 'running')
      AND NOT EXISTS (SELECT 1 FROM builds WHERE state = 'running' AND device = ?)
    ORDER BY EXISTS (SELECT 1 FROM awaited WHERE build = builds.id) DESC, priority DESC, number
    LIMIT 1
"""
"""Awaited ones first, then by priority, then as they came; one per device and one per cache."""

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


def prepare(database: sqlite3.Connection) -> None:
    """Set the connection up: what is committed survives a power cut, readers never block."""
    database.row_factory = sqlite3.Row
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("PRAGMA foreign_keys = ON")


def make_tables(database: sqlite3.Connection) -> int:
    """Make the tables where there are none, inside a transaction. Returns the version found."""
    (found,) = database.execute("PRAGMA user_version").fetchone()
    if found == 0:
        for statement in TABLES:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return int(found) or SCHEMA_VERSION


def build_of(row: sqlite3.Row) -> Build:
    """A row of `builds`."""
    request = BuildRequest.model_validate(json.loads(row["request"]))
    progress, error = row["progress"], row["error"]
    return Build(
        id=row["id"],
        state=row["state"],
        cache=row["cache"],
        teacher=request.teacher,
        dataset=request.dataset,
        seeds=describe(request),
        priority=row["priority"],
        canceling=bool(row["canceling"]) and row["state"] == "running",
        device=row["device"],
        request=request,
        progress=progress and BuildProgress.model_validate_json(progress),
        error=error and BuildError.model_validate_json(error),
        created_s=row["created_s"],
        started_s=row["started_s"],
        finished_s=row["finished_s"],
        version=row["version"],
    )
