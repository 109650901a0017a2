"""Builds and traffic at one moment: as values, as text of the pages, and as events."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from cache_service.api.builds.queue import Build
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.service import Service
from cache_service.api.page.formatting import UNKNOWN, count, latency
from cache_service.human_format import human_bytes, human_seconds

MAX_BUILDS = 20
"""Builds on a page: first those that wait or run, then the newest of the others."""

MAX_SEARCHED = 200
"""Newest builds in which those of one cache are looked for."""

ACTIVE = ("queued", "running")


class Activity(NamedTuple):
    """Builds and traffic at one moment, as the event stream sends them.

    Attributes:
        builds: those that wait or run, then the others, each the newest first. Rates and times are
            None if they are not known (yet), `rows_total` is 0 before a build has begun, and
            `error` is empty unless it failed.
        traffic: requests of the last minute. The latencies are None if there was no request.
        out_of_space: since when builds lack space (`since_s`, Unix time) and the error of the first
            write that failed (`detail`); None if they do not.
    """

    builds: list[dict[str, Any]]
    traffic: dict[str, float | None]
    out_of_space: dict[str, Any] | None = None

    @property
    def num_active(self) -> int:
        """Builds that wait or run."""
        return sum(build["state"] in (*ACTIVE, "canceling") for build in self.builds)


def activity(service: Service, builds: Builds | None, *, cache: str = "") -> Activity:
    """The server's newest builds and its traffic.

    Args:
        service: the service.
        builds: its builds; None if its configuration has none.
        cache: name of the only cache whose builds are wanted; empty for all.

    Raises:
        StorageError: the queue cannot be read.
    """
    newest: Sequence[Build] = ()
    if builds is not None:
        newest = builds.queue.newest(limit=MAX_SEARCHED)
    wanted = [build for build in newest if cache in ("", build.cache)]
    wanted.sort(key=lambda build: build.state not in ACTIVE)
    shortage = None if builds is None else builds.out_of_space()
    return Activity(
        [_summary(build) for build in wanted[:MAX_BUILDS]],
        service.traffic.figures(),
        None if shortage is None else shortage.model_dump(mode="json"),
    )


def _summary(build: Build) -> dict[str, Any]:
    progress, error = build.progress, build.error
    ends_s = build.finished_s or time.time()
    # A build that waits has taken no time yet, also after a restart in which it went back.
    begun_s = None if build.state == "queued" else build.started_s
    return {
        "id": build.id,
        "cache": build.cache,
        "teacher": build.teacher,
        "dataset": build.dataset,
        "seeds": build.seeds,
        "state": "canceling" if build.canceling else build.state,
        "created_s": build.created_s,
        "started_s": begun_s,
        "finished_s": build.finished_s,
        "took_s": None if begun_s is None else max(ends_s - begun_s, 0.0),
        "rows_done": max(progress.rows_done, progress.rows_answered) if progress else 0,
        "rows_total": progress.rows_total if progress else 0,
        "rows_per_s": progress.rows_per_s if progress else None,
        "eta_s": progress.eta_s if progress else None,
        "error": f"{error.detail} {error.hint}".strip() if error else "",
        "error_code": error.code if error else "",
    }


class LiveFigures(NamedTuple):
    """Figures that change while the page is open, as text.

    Attributes:
        shown: text by the id of the element that holds it.
        progress: finished fraction by the id of the progress bar.
        active: number of builds that are queued or running.
        structure: changes when the page needs other elements, and not with figures.
    """

    shown: dict[str, str]
    progress: dict[str, float]
    active: str
    structure: str


def live_figures(now: Activity, *, recorded: object = None) -> LiveFigures:
    """Format the figures. Builds are numbered from 1 in their order on the page.

    Args:
        now: builds and traffic.
        recorded: another value that changes with the elements of the page.
    """
    shown: dict[str, str] = {}
    progress: dict[str, float] = {}
    for number, build in enumerate(now.builds, start=1):
        name, done, total = f"build-{number}", build["rows_done"], build["rows_total"]
        shown |= {
            f"{name}-state": build["state"],
            f"{name}-rows": _rows(done, total),
            f"{name}-took": UNKNOWN if build["took_s"] is None else human_seconds(build["took_s"]),
            f"{name}-pace": _pace(build),
        }
        progress[f"{name}-bar"] = round(min(done / total, 1.0), 4) if total else 0.0
    traffic = now.traffic
    shown |= {
        "traffic-requests": f"{traffic['requests_per_s']:,.1f}",
        "traffic-median": latency(traffic["p50_s"]),
        "traffic-slow": latency(traffic["p99_s"]),
        "traffic-bytes": human_bytes(traffic["bytes_per_s"] or 0),
        "traffic-failed": f"{traffic['failed_per_s']:,.1f}",
    }
    elements = [(build["id"], build["state"], build["error"]) for build in now.builds]
    structure = repr((elements, traffic["p50_s"] is None, now.out_of_space, recorded))
    return LiveFigures(
        shown=shown,
        progress=progress,
        active=str(now.num_active),
        structure=hashlib.blake2b(structure.encode(), digest_size=8).hexdigest(),
    )


def _rows(done: int, total: int) -> str:
    if not total:
        return UNKNOWN
    return count(total) if done == total else f"{count(done)} of {count(total)}"


def _pace(build: dict[str, Any]) -> str:
    """Speed and time left of a build that runs; empty for any other."""
    rate, eta_s = build["rows_per_s"], build["eta_s"]
    if build["state"] not in ("running", "canceling"):
        return ""
    if not rate:
        return "starting"
    left = "" if eta_s is None else f", {human_seconds(eta_s)} left"
    return f"{count(rate)} rows/s{left}"


def event_document(now: Activity, figures: LiveFigures) -> dict[str, Any]:
    """The document of one event: texts for the page, and the figures themselves for programs."""
    return figures._asdict() | now._asdict()
