"""What the overview and the page of one cache show of caches, as values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.catalog import Catalog
from cache_service.api.http.damage import FoundDamage
from cache_service.api.http.service import Service
from cache_service.api.page.activity import Activity, activity
from cache_service.api.page.formatting import percent
from cache_service.errors import CorruptError, KdCacheError
from cache_service.format.seeds import describe_seeds
from cache_service.format.spec import CacheSpec

MAX_LISTED_SEEDS = 12
"""Incomplete seeds that are named one by one."""

HIDDEN_ROOT = "ROOT"
"""Shown in place of the root where visitors may be others than the operator."""

LEVELS = 5
"""Levels of a box: 0 nothing is recorded, 4 everything, 1 to 3 a third each of what is between."""


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
        planned_rows: views that will be recorded in the end.
        changed_s: when a shard was committed last, Unix time; None if that is not known.
        damage: that reading has found; None if there is none.
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
    planned_rows: int
    changed_s: float | None
    damage: FoundDamage | None
    row_bytes: int
    stored_bytes: int
    coverage: Coverage
    seeds: str
    incomplete: str
    codec: str
    recipe: str

    @property
    def fraction(self) -> float:
        """Recorded part of the planned views."""
        return min(self.rows / max(self.planned_rows, 1), 1.0)

    @property
    def state(self) -> str:
        """Whether everything is recorded, or how much of it."""
        if self.rows >= self.planned_rows:
            return "complete"
        return f"{percent(self.fraction)} recorded" if self.rows else "empty"


def cache_card(catalog: Catalog, name: str, *, rows: int = 40, columns: int = 64) -> CacheCard:
    """Collect the figures of one cache.

    Args:
        catalog: the caches of the server.
        name: of the cache.
        rows, columns: largest size of its picture, in boxes.

    Raises:
        NotACacheError, CorruptError: there is no such cache, or it cannot be opened.
    """
    opened = catalog.open(name)
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
    shown = coverage(
        commits, num_seeds=cache.num_seeds(), num_shards=count, rows=rows, columns=columns
    )
    return CacheCard(
        name=name,
        fingerprint=cache.fingerprint,
        spec=spec,
        versions=cache.versions,
        rows=recorded,
        planned_rows=shown.num_seeds * spec.dataset.num_samples,
        changed_s=catalog.changed_s(name),
        damage=catalog.damage.of(name),
        row_bytes=size,
        stored_bytes=recorded * size,
        coverage=shown,
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


class BrokenCache(NamedTuple):
    """A cache that cannot be opened, and why. `state` is `damaged` or `unreadable`."""

    name: str
    state: str
    refusal: KdCacheError
    changed_s: float | None


class Overview(NamedTuple):
    """The first page.

    Attributes:
        root: where the caches are, if visitors may know it.
        cards, broken: the caches that can be opened, and those that cannot.
    """

    root: str
    cards: list[CacheCard]
    broken: list[BrokenCache]
    runs_builds: bool
    activity: Activity

    @property
    def recording(self) -> set[str]:
        """Names of the caches that a build of this server is recording now."""
        builds = self.activity.builds
        return {build["cache"] for build in builds if build["state"] in ("running", "canceling")}


def overview(service: Service, builds: Builds | None) -> Overview:
    """Open every cache; one that cannot be opened is listed with the reason."""
    cards: list[CacheCard] = []
    broken: list[BrokenCache] = []
    for name in service.catalog.names():
        try:
            cards.append(cache_card(service.catalog, name))
        except KdCacheError as refusal:
            state = "damaged" if isinstance(refusal, CorruptError) else "unreadable"
            broken.append(BrokenCache(name, state, refusal, service.catalog.changed_s(name)))
    root = HIDDEN_ROOT if service.config.tokens else service.config.root
    return Overview(root, cards, broken, builds is not None, activity(service, builds))
