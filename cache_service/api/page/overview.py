"""What the overview and the page of one cache show: caches, builds and traffic as values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.api.builds.queue import Build
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.catalog import OpenCache
from cache_service.api.http.service import Service
from cache_service.errors import KdCacheError
from cache_service.format.seeds import describe_seeds
from cache_service.format.spec import CacheSpec
from cache_service.human_format import human_bytes, human_seconds

MAX_BUILDS = 20
"""Builds on the page, the newest first."""

MAX_LISTED_SEEDS = 12
"""Incomplete seeds that are named one by one."""

HIDDEN_ROOT = "ROOT"
"""Shown in place of the root where visitors may be others than the operator."""

LEVELS = 5
"""Levels of a box: 0 nothing is recorded, 4 everything, 1 to 3 a third each of what is between."""

ACTIVE = ("queued", "running")

UNKNOWN = "\N{EN DASH}"


class Coverage(NamedTuple):
    """What is recorded of the planned part of a cache, and the boxes of its picture.

    A seed is a row of the picture, and a shard a column. If there are more of them than fit,
    neighbors share a box, and its level says how much of it is recorded.

    Attributes:
        first_seed: where the picture begins; later than 0 if nothing before it was planned.
        num_seeds: seeds from there to the last planned one.
        num_shards: per seed.
        recorded: shards that are recorded.
        complete: seeds of which every shard is recorded.
        levels_YX: int [rows, columns], 0 to LEVELS - 1.
    """

    first_seed: int
    num_seeds: int
    num_shards: int
    recorded: int
    complete: int
    levels_YX: NDArray[np.int64]

    @property
    def planned(self) -> int:
        """Shards that will be recorded in the end."""
        return self.num_seeds * self.num_shards

    @property
    def fraction(self) -> float:
        """Recorded part of what is planned."""
        return self.recorded / max(self.planned, 1)

    @property
    def summary(self) -> str:
        """What is recorded, in words."""
        return (
            f"{self.complete:,} of {self.num_seeds:,} seeds complete, "
            f"{self.recorded:,} of {self.planned:,} shards recorded"
        )

    @property
    def axes(self) -> str:
        """What the rows and the columns of the picture stand for."""
        last = self.first_seed + self.num_seeds - 1
        seeds = f"seed {last}" if self.num_seeds == 1 else f"seeds {self.first_seed} to {last}"
        shards = "1 shard" if self.num_shards == 1 else f"{self.num_shards:,} shards"
        height, width = self.levels_YX.shape
        rows = _axis("Rows", seeds, self.num_seeds / max(height, 1))
        return f"{rows}; {_axis('columns', shards, self.num_shards / max(width, 1))}"


def _axis(what: str, content: str, per_box: float) -> str:
    shared = f", about {per_box:.3g} in each" if per_box > 1 else ""
    return f"{what}: {content}{shared}"


def coverage(
    commits: Mapping[int, Sequence[int]],
    *,
    num_seeds: int,
    num_shards: int,
    rows: int = 40,
    columns: int = 64,
) -> Coverage:
    """Sum up what is recorded.

    Args:
        commits: recorded shards by seed.
        num_seeds: length of the seed axis.
        num_shards: per seed.
        rows, columns: largest size of the picture, in boxes.
    """
    first = _first_planned(commits, num_seeds)
    seeds = num_seeds - first
    height, width = min(rows, seeds), min(columns, num_shards)
    counts_YX = np.zeros((height, width), np.int64)
    for seed, shards in commits.items():
        if first <= seed < num_seeds and len(shards):
            boxes = np.asarray(shards, np.int64) * width // num_shards
            counts_YX[(seed - first) * height // seeds] += np.bincount(boxes, minlength=width)
    per_row = np.bincount(np.arange(seeds) * height // max(seeds, 1), minlength=height)
    per_column = np.bincount(np.arange(num_shards) * width // num_shards, minlength=width)
    whole_YX = per_row[:, None] * per_column[None, :]
    partial_YX = 1 + counts_YX * (LEVELS - 2) // np.maximum(whole_YX, 1)
    levels_YX = np.where(counts_YX == 0, 0, np.where(counts_YX == whole_YX, LEVELS - 1, partial_YX))
    return Coverage(
        first_seed=first,
        num_seeds=seeds,
        num_shards=num_shards,
        recorded=sum(len(shards) for seed, shards in commits.items() if seed < num_seeds),
        complete=sum(len(s) == num_shards for seed, s in commits.items() if seed < num_seeds),
        levels_YX=levels_YX,
    )


def _first_planned(commits: Mapping[int, Sequence[int]], num_seeds: int) -> int:
    """0, unless most of the seed axis lies before the first recorded seed.

    A build of the seeds 1000:1008 makes an axis of 1,008 seeds, of which it plans 8.
    """
    recorded = [seed for seed, shards in commits.items() if len(shards) and seed < num_seeds]
    first = min(recorded, default=0)
    return first if 2 * first > num_seeds else 0


class CacheCard(NamedTuple):
    """One cache in figures.

    Attributes:
        rows: recorded views.
        stored_bytes: of their arrays, uncompressed.
        seeds: complete ones, as people write them.
        incomplete: the first few seeds that are begun and not complete, in words.
        codec, recipe: in a few words.
    """

    name: str
    fingerprint: str
    spec: CacheSpec
    versions: dict[str, str]
    rows: int
    row_bytes: int
    stored_bytes: int
    coverage: Coverage
    seeds: str
    incomplete: str
    codec: str
    recipe: str


def cache_card(name: str, opened: OpenCache, *, rows: int = 40, columns: int = 64) -> CacheCard:
    """Collect the figures of one cache.

    Args:
        name: under which the server knows it.
        opened: the cache.
        rows, columns: largest size of its picture, in boxes.
    """
    cache, commits = opened.cache, opened.commits()
    spec, recipe = cache.spec, cache.spec.recipe
    steps: list[str] = [op.op for op in recipe.ops] or [f"code of its own: {recipe.callable}"]
    count, size = spec.num_shards, cache.group.layout.row_bytes
    missing = count * spec.layout.shard_rows - spec.dataset.num_samples
    recorded = sum(
        # Every shard is full except the last one of a seed.
        len(shards) * spec.layout.shard_rows - (shards[-1] == count - 1) * missing
        for shards in commits.values()
        if shards
    )
    return CacheCard(
        name=name,
        fingerprint=cache.fingerprint,
        spec=spec,
        versions=cache.versions,
        rows=recorded,
        row_bytes=size,
        stored_bytes=recorded * size,
        coverage=coverage(
            commits, num_seeds=cache.num_seeds(), num_shards=count, rows=rows, columns=columns
        ),
        seeds=describe_seeds([seed for seed, shards in commits.items() if len(shards) == count]),
        incomplete=_describe_incomplete(commits, count),
        codec=spec.codec.describe(),
        recipe=f"{', '.join(steps)}; {recipe.size} px",
    )


def _describe_incomplete(commits: Mapping[int, Sequence[int]], count: int) -> str:
    begun = [
        f"seed {seed} ({len(shards):,} of {count:,} shards)"
        for seed, shards in commits.items()
        if len(shards) < count
    ]
    more = len(begun) - MAX_LISTED_SEEDS
    return ", ".join(begun[:MAX_LISTED_SEEDS] + ([f"{more:,} more"] if more > 0 else []))


class Activity(NamedTuple):
    """Builds and traffic at one moment, as the event stream sends them.

    Attributes:
        builds: the newest first. Rates and times are None if they are not known (yet), `rows_total`
            is 0 before a build has begun, and `error` is empty unless it failed.
        traffic: requests of the last minute. The latencies are None if there was no request.
    """

    builds: list[dict[str, Any]]
    traffic: dict[str, float | None]


def activity(service: Service, builds: Builds | None) -> Activity:
    """The server's newest builds and its traffic.

    Args:
        service: the service.
        builds: its builds; None if its configuration has none.

    Raises:
        StorageError: the queue cannot be read.
    """
    newest = () if builds is None else builds.queue.newest(limit=MAX_BUILDS)
    return Activity([_summary(build) for build in newest], service.traffic.figures())


def _summary(build: Build) -> dict[str, Any]:
    progress, error = build.progress, build.error
    return {
        "id": build.id,
        "cache": build.cache,
        "teacher": build.teacher,
        "dataset": build.dataset,
        "state": build.state,
        "rows_done": progress.rows_done if progress else 0,
        "rows_total": progress.rows_total if progress else 0,
        "rows_per_s": progress.rows_per_s if progress else None,
        "eta_s": progress.eta_s if progress else None,
        "error": f"{error.detail} {error.hint}".strip() if error else "",
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


def live_figures(now: Activity) -> LiveFigures:
    """Format the figures. Builds are numbered from 1 in their order on the page."""
    shown: dict[str, str] = {}
    progress: dict[str, float] = {}
    for number, build in enumerate(now.builds, start=1):
        name, done, total = f"build-{number}", build["rows_done"], build["rows_total"]
        running = build["state"] == "running"
        rate, eta_s = build["rows_per_s"], build["eta_s"]
        shown |= {
            f"{name}-state": build["state"],
            f"{name}-rows": f"{count(done)} of {count(total)}" if total else UNKNOWN,
            f"{name}-rate": f"{count(rate)} rows/s" if running and rate is not None else UNKNOWN,
            f"{name}-eta": human_seconds(eta_s) if running and eta_s is not None else UNKNOWN,
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
    structure = repr((elements, traffic["p50_s"] is None))
    return LiveFigures(
        shown=shown,
        progress=progress,
        active=str(sum(build["state"] in ACTIVE for build in now.builds)),
        structure=hashlib.blake2b(structure.encode(), digest_size=8).hexdigest(),
    )


def event_document(now: Activity) -> dict[str, Any]:
    """The document of one event: texts for the page, and the figures themselves for programs."""
    return live_figures(now)._asdict() | now._asdict()


def count(number: float) -> str:
    """`1234567` -> `1,234,567`."""
    return f"{number:,.0f}"


def latency(seconds: float | None) -> str:
    """Milliseconds up to a second."""
    if seconds is None:
        return UNKNOWN
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


class Overview(NamedTuple):
    """The first page.

    Attributes:
        root: where the caches are, if visitors may know it.
        broken: the reason why a cache cannot be opened, by its name.
    """

    root: str
    cards: list[CacheCard]
    broken: dict[str, KdCacheError]
    runs_builds: bool
    activity: Activity


def overview(service: Service, builds: Builds | None) -> Overview:
    """Open every cache; one that cannot be opened is listed with the reason."""
    cards: list[CacheCard] = []
    broken: dict[str, KdCacheError] = {}
    for name in service.catalog.names():
        try:
            cards.append(cache_card(name, service.catalog.open(name)))
        except KdCacheError as refusal:
            broken[name] = refusal
    root = HIDDEN_ROOT if service.config.tokens else service.config.root
    return Overview(root, cards, broken, builds is not None, activity(service, builds))
