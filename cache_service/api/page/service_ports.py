"""The pages' view of the real service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cache_service.api.builds.queue import Build
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.service import Service
from cache_service.api.page.ports import BuildNews, Opened, Traffic

MAX_BUILDS = 20
"""Builds on the page, the newest first."""

SOMEWHERE = "ROOT"
"""What the root is called where visitors may be others than the operator."""


class ServicePorts:
    """See `ports.Ports`."""

    def __init__(self, service: Service, builds: Builds | None) -> None:
        self._service = service
        self._builds = builds

    @property
    def root(self) -> str:
        """As the operator wrote it; a place-holder where tokens let others in."""
        config = self._service.config
        return SOMEWHERE if config.tokens else config.root

    @property
    def datasets(self) -> tuple[Mapping[str, Any], ...]:
        """`builds.datasets` of the server's configuration."""
        builds = self._service.config.builds
        if builds is None:
            return ()
        return tuple(each.model_dump(mode="json") for each in builds.datasets.values())

    @property
    def builds_enabled(self) -> bool:
        """Whether the server runs builds."""
        return self._builds is not None

    def names(self) -> list[str]:
        """Names of the caches, sorted."""
        return self._service.catalog.names()

    def open(self, name: str) -> Opened:
        """A cache with what is recorded of it; raises NotACacheError."""
        served = self._service.catalog.open(name)
        return Opened(served.cache, served.commits())

    def builds(self) -> list[BuildNews]:
        """Builds, the newest first."""
        found = self._builds
        return [] if found is None else [news_of(build) for build in found.newest(MAX_BUILDS)]

    def traffic(self) -> Traffic:
        """Requests of the last minute."""
        figures = self._service.traffic.figures()
        return Traffic(
            requests_per_s=figures["requests_per_second"],
            failed_per_s=figures["errors_per_second"],
            bytes_per_s=figures["bytes_per_second"],
            p50_s=_seconds(figures["p50_ms"]),
            p99_s=_seconds(figures["p99_ms"]),
        )


def news_of(build: Build) -> BuildNews:
    """What the page shows of a build."""
    progress, error = build.progress, build.error
    return BuildNews(
        id=build.id,
        cache=build.cache,
        teacher=build.teacher,
        dataset=build.dataset,
        state=build.state,
        rows_done=progress.rows_done if progress else 0,
        rows_total=progress.rows_total if progress else 0,
        rows_per_s=progress.rows_per_s if progress else None,
        eta_s=progress.eta_s if progress else None,
        error=f"{error.detail} {error.hint}".strip() if error else "",
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
