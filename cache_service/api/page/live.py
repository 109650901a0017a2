"""Figures that move: the same words in the first answer and in every event after it. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from cache_service.api.page.ports import BuildNews, Traffic
from cache_service.api.page.rendering import count, latency
from cache_service.human_format import human_bytes, human_seconds

ACTIVE = ("queued", "running")

TONES = {"queued": "", "running": "busy", "done": "good", "failed": "bad", "canceled": ""}
"""Class of a state's pill."""

UNKNOWN = "\N{EN DASH}"


class Figures(NamedTuple):
    """What is shown of builds and traffic.

    Attributes:
        shown: text by the id of the element that holds it.
        progress: share done by the id of its bar.
        active: builds queued or running.
        structure: changes where other elements are needed, and not with figures.
    """

    shown: dict[str, str]
    progress: dict[str, float]
    active: str
    structure: str
    tones: dict[str, str]


def figures_of(builds: Sequence[BuildNews], traffic: Traffic) -> Figures:
    """Put into words. Builds are numbered from 1 in the order given, which is the page's."""
    shown: dict[str, str] = {}
    progress: dict[str, float] = {}
    for number, build in enumerate(builds, start=1):
        name = f"build-{number}"
        shown[f"{name}-state"] = build.state
        shown[f"{name}-rows"] = _rows(build)
        shown[f"{name}-rate"] = _rate(build)
        shown[f"{name}-eta"] = _left(build)
        progress[f"{name}-bar"] = _share(build)
    shown |= {
        "traffic-requests": f"{traffic.requests_per_s:,.1f}",
        "traffic-median": latency(traffic.p50_s),
        "traffic-slow": latency(traffic.p99_s),
        "traffic-bytes": human_bytes(traffic.bytes_per_s),
        "traffic-failed": f"{traffic.failed_per_s:,.1f}",
    }
    shape = [(build.id, build.state, build.error) for build in builds]
    seen = repr((shape, traffic.p50_s is None))
    return Figures(
        shown=shown,
        progress=progress,
        active=str(sum(build.state in ACTIVE for build in builds)),
        structure=hashlib.blake2b(seen.encode(), digest_size=8).hexdigest(),
        tones=TONES,
    )


def event_of(figures: Figures, builds: Sequence[BuildNews], traffic: Traffic) -> dict[str, Any]:
    """The document of one event: the words for the page, and the raw figures for programs."""
    return {
        "structure": figures.structure,
        "active": figures.active,
        "shown": figures.shown,
        "progress": figures.progress,
        "builds": [build._asdict() for build in builds],
        "traffic": traffic._asdict(),
    }


def _rows(build: BuildNews) -> str:
    known = f"{count(build.rows_done)} of {count(build.rows_total)}"
    return known if build.rows_total else UNKNOWN


def _share(build: BuildNews) -> float:
    return round(min(build.rows_done / build.rows_total, 1.0), 4) if build.rows_total else 0.0


def _rate(build: BuildNews) -> str:
    known = build.state == "running" and build.rows_per_s is not None
    return f"{count(build.rows_per_s or 0)} rows/s" if known else UNKNOWN


def _left(build: BuildNews) -> str:
    known = build.state == "running" and build.eta_s is not None
    return human_seconds(build.eta_s) if known else UNKNOWN
