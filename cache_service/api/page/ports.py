"""What the pages ask of the service around them, and nothing more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from cache_service.rows.reader import Cache


class BuildNews(NamedTuple):
    """A build of the server's queue, as it is now.

    Attributes:
        state: `queued`, `running`, `done`, `failed` or `canceled`.
        rows_per_s, eta_s: None where they are not known (yet).
        rows_total: 0 before it has begun.
        error: why it failed; empty otherwise.
    """

    id: str
    cache: str
    teacher: str
    dataset: str
    state: str
    rows_done: int
    rows_total: int
    rows_per_s: float | None
    eta_s: float | None
    error: str


class Traffic(NamedTuple):
    """Requests of the last minute.

    Attributes:
        failed_per_s: answered with a server's error, or left by the client.
        p50_s, p99_s: of the latency; None where no request came in.
    """

    requests_per_s: float
    failed_per_s: float
    bytes_per_s: float
    p50_s: float | None
    p99_s: float | None


class Opened(NamedTuple):
    """A cache and its recorded shards by seed, both ascending."""

    cache: Cache
    commits: Mapping[int, Sequence[int]]


class Ports(Protocol):
    """The service, seen from the pages. Everything may be called from several threads."""

    @property
    def root(self) -> str:
        """Where the caches lie, as far as visitors may know it."""
        ...

    @property
    def datasets(self) -> tuple[Mapping[str, Any], ...]:
        """`dataset:` sections that the server's own configuration allows to be opened."""
        ...

    @property
    def builds_enabled(self) -> bool:
        """Whether the configuration has builds."""
        ...

    def names(self) -> list[str]:
        """Names of the caches, sorted."""
        ...

    def open(self, name: str) -> Opened:
        """A cache with what is recorded of it.

        Raises:
            NotACacheError: there is none of that name.
        """
        ...

    def builds(self) -> list[BuildNews]:
        """Builds, the newest first."""
        ...

    def traffic(self) -> Traffic:
        """Requests of the last minute."""
        ...
