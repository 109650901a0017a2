"""A service for tests of the pages alone: real caches, and builds and traffic that tests set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_service.api.app import create_app
from cache_service.api.builds.queue import Build
from cache_service.api.builds.space import OutOfSpace
from cache_service.api.http.settings import ServeConfig
from cache_service.api.page.images import ImageRenderer
from cache_service.api.page.rendering import Pages
from support.build_queue import builds_document, request_document

LONG = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
"""As ImageNet's names of classes are, of which this is one."""

QUIET: dict[str, Any] = {
    "requests_per_s": 0.0,
    "failed_per_s": 0.0,
    "bytes_per_s": 0.0,
    "p50_s": None,
    "p99_s": None,
}
BUSY: dict[str, Any] = {
    "requests_per_s": 412.3,
    "failed_per_s": 0.1,
    "bytes_per_s": 48_200_000.0,
    "p50_s": 0.0021,
    "p99_s": 0.0184,
}


def make_build(*, error: str = "", **changes: Any) -> Build:
    """A running build; `changes` are fields of it or of its progress."""
    progress: dict[str, Any] = {
        "rows_done": 412_000,
        "rows_answered": 0,
        "rows_total": 1_500_000,
        "shards_done": 4,
        "shards_total": 15,
        "shards_committed": 4,
        "bytes_written": 0,
        "rows_per_s": 5312.0,
        "eta_s": 204.8,
    }
    fields: dict[str, Any] = {
        "id": "9f2c51d07ab34e10",
        "state": "running",
        "cache": "c100-r32x4",
        "teacher": "resnet32x4",
        "dataset": "cifar100",
        "seeds": "0:2",
        "priority": 0,
        "canceling": False,
        "device": "cpu",
        "request": request_document(),
        "error": {"code": "error", "status": 500, "detail": error, "hint": ""} if error else None,
        "created_s": 0.0,
        "started_s": None,
        "finished_s": None,
        "version": 1,
    }
    for name, value in changes.items():
        (progress if name in progress else fields)[name] = value
    return Build.model_validate({**fields, "progress": progress})


class PageService:
    """Attributes are what a test changes while its pages are shown.

    Attributes:
        builds: of the queue, the newest first.
        figures: of the traffic.
        shortage: of space for builds.
    """

    def __init__(
        self,
        root: Path,
        datasets: tuple[dict[str, Any], ...] = (),
        *,
        runs_builds: bool = True,
    ) -> None:
        listed = {f"d{number}": dataset for number, dataset in enumerate(datasets)}
        builds = builds_document(datasets=listed)
        config = ServeConfig.model_validate({"root": str(root), "builds": builds})
        self.service = create_app(config).state.service
        self.service.traffic = self
        self.service.catalog.place = lambda *_: None  # the real queue is not started
        self.queue = self
        self._builds = self if runs_builds else None
        self.builds: list[Build] = []
        self.traffic_figures = QUIET
        self.shortage: OutOfSpace | None = None

    def newest(self, limit: int) -> list[Build]:
        return self.builds[:limit]

    def out_of_space(self) -> OutOfSpace | None:
        return self.shortage

    def figures(self) -> dict[str, Any]:
        return self.traffic_figures

    def pages(self, **settings: Any) -> Pages:
        return Pages(self.service, self._builds, **settings)  # type: ignore[arg-type]


def no_images() -> ImageRenderer:
    """A renderer whose process ends at once."""
    return ImageRenderer(command=("/bin/false",))
