"""What the overview and the page of one cache show: facts gathered from the service, as values."""

from __future__ import annotations

from typing import NamedTuple

from cache_service.api.page.coverage import Coverage, coverage
from cache_service.api.page.ports import BuildNews, Opened, Ports, Traffic
from cache_service.errors import KdCacheError
from cache_service.format.recipe import Recipe
from cache_service.format.seeds import describe_seeds
from cache_service.format.spec import CacheSpec

MAX_LISTED = 12
"""Incomplete seeds that are named one by one."""


class CacheCard(NamedTuple):
    """One cache in figures.

    Attributes:
        rows: recorded views.
        stored_bytes: of their arrays, uncompressed.
        seeds: complete ones, as people write them.
        incomplete: (seed, recorded shards), the first few of those begun and not complete.
        more_incomplete: how many there are beside those.
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
    incomplete: tuple[tuple[int, int], ...]
    more_incomplete: int

    @property
    def begun(self) -> str:
        """Seeds that are begun and not complete, as a list in one line."""
        total = self.coverage.num_shards
        parts = [
            f"seed {seed} ({shards:,} of {total:,} shards)" for seed, shards in self.incomplete
        ]
        more = [f"{self.more_incomplete:,} more"] if self.more_incomplete else []
        return ", ".join(parts + more)

    @property
    def codec(self) -> str:
        """The codec in a few words."""
        return self.spec.codec.describe()

    @property
    def recipe(self) -> str:
        """The recipe in one line."""
        return describe_recipe(self.spec.recipe)


class Broken(NamedTuple):
    """A cache that cannot be opened, and why."""

    name: str
    message: str
    hint: str


class Overview(NamedTuple):
    """The whole first page."""

    root: str
    cards: tuple[CacheCard, ...]
    broken: tuple[Broken, ...]
    builds: tuple[BuildNews, ...]
    builds_enabled: bool
    traffic: Traffic


def overview(ports: Ports) -> Overview:
    """Look at every cache; one that cannot be opened is listed with the reason."""
    cards, broken = [], []
    for name in ports.names():
        try:
            cards.append(card(name, ports.open(name)))
        except KdCacheError as refusal:
            broken.append(Broken(name, refusal.message, refusal.hint))
    return Overview(
        ports.root,
        tuple(cards),
        tuple(broken),
        tuple(ports.builds()),
        ports.builds_enabled,
        ports.traffic(),
    )


def card(name: str, opened: Opened, *, rows: int = 40, columns: int = 64) -> CacheCard:
    """Facts of one cache.

    Args:
        name: under which the server knows it.
        opened: the cache.
        rows, columns: of its picture, at most.
    """
    cache, commits = opened
    spec = cache.spec
    count, size = spec.num_shards, cache.group.layout.row_bytes
    complete = [seed for seed, shards in commits.items() if len(shards) == count]
    begun = [(seed, len(shards)) for seed, shards in commits.items() if len(shards) < count]
    recorded = sum(
        # Every shard is full but the last one.
        len(shards) * spec.layout.shard_rows - (shards[-1] == count - 1) * _missing(spec)
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
        seeds=describe_seeds(complete),
        incomplete=tuple(begun[:MAX_LISTED]),
        more_incomplete=max(len(begun) - MAX_LISTED, 0),
    )


def describe_recipe(recipe: Recipe) -> str:
    """The names of its steps, in order, and the view's size."""
    steps: list[str] = [op.op for op in recipe.ops] or [f"code of its own: {recipe.callable}"]
    return f"{', '.join(steps)}; {recipe.size} px"


def _missing(spec: CacheSpec) -> int:
    """Rows by which the last shard is shorter than the others."""
    return spec.num_shards * spec.layout.shard_rows - spec.dataset.num_samples
