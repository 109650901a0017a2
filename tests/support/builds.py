"""Build files for tests, and the shortest way to run one in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import BuildContext, open_build
from cache_service.recording.engines import prepare, run_local
from cache_service.rows.reader import Cache, open_cache


def build_document(cache: str, /, **changes: Any) -> dict[str, Any]:
    """A build file of the toys: 96 samples, 3 shards a seed."""
    document: dict[str, Any] = {
        "cache": cache,
        "dataset": {"name": "support.toys:patches", "args": {"num_samples": 96}},
        "augment": {"preset": "cifar", "size": 16},
        "seeds": "0:2",
        "teacher": {"model": "support.toys:tiny_net", "allow_untrained": True},
        "scales": [1, 2],
        "codec": {"kind": "dense"},
        "layout": {"shard_rows": 32, "chunk_rows": 8},
        "batch_size": 16,
        "workers": 0,
        "device": "cpu",
    }
    for path, value in changes.items():
        here = document
        *parents, last = path.split("__")
        for parent in parents:
            here = here.setdefault(parent, {})
        here[last] = value
    return document


def open_toy(cache: str, /, **changes: Any) -> BuildContext:
    return open_build(BuildConfig.model_validate(build_document(cache, **changes)))


def run_build(build: BuildContext, **arguments: Any) -> Cache:
    prepare(build)
    run_local(build, seeds=arguments.pop("seeds", build.config.seeds), **arguments)
    return open_cache(build.config.cache)


def record_toy(cache: str, /, **changes: Any) -> Cache:
    """Record the toys into `cache` and open the result."""
    return run_build(open_toy(cache, **changes))


def write_file(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def tree_bytes(root: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
