"""The service as the pages see it, over a folder of real caches: for tests of the pages alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cache_service.api.page.ports import BuildNews, Opened, Traffic
from cache_service.errors import NotACacheError
from cache_service.rows.reader import open_cache

QUIET = Traffic(0.0, 0.0, 0.0, None, None)
BUSY = Traffic(412.3, 0.1, 48_200_000.0, 0.0021, 0.0184)


def news(**changes: Any) -> BuildNews:
    facts: dict[str, Any] = {
        "id": "9f2c51d07ab34e10",
        "cache": "c100-r32x4",
        "teacher": "resnet32x4",
        "dataset": "cifar100",
        "state": "running",
        "rows_done": 412_000,
        "rows_total": 1_500_000,
        "rows_per_s": 5312.0,
        "eta_s": 204.8,
        "error": "",
    }
    return BuildNews(**(facts | changes))


class FolderPorts:
    """Attributes are what a test changes while a server runs."""

    def __init__(self, root: Path, datasets: tuple[dict[str, Any], ...] = ()) -> None:
        self.root = str(root)
        self.datasets = datasets
        self.builds_enabled = True
        self.news: list[BuildNews] = []
        self.seen = QUIET

    def names(self) -> list[str]:
        folder = Path(self.root)
        return sorted(each.name for each in folder.iterdir() if (each / "zarr.json").is_file())

    def open(self, name: str) -> Opened:
        if name not in self.names():
            raise NotACacheError(f"there is no cache {name!r} here.")
        cache = open_cache(f"{self.root}/{name}")
        return Opened(cache, cache.commits())

    def builds(self) -> list[BuildNews]:
        return self.news

    def traffic(self) -> Traffic:
        return self.seen
