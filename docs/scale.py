"""What recordings of ImageNet cost, worked out from their layouts: tables of docs/scale.md."""

from __future__ import annotations

from typing import Any, NamedTuple

from cache_service.format.layout import CacheLayout, default_layout
from cache_service.format.recipe import AugmentConfig
from cache_service.format.spec import CacheSpec, DatasetId, Layout, Preprocess, TeacherId
from cache_service.recording.plan import (
    bucket_requests,
    commit_bytes,
    num_objects,
    seed_bytes,
    server_requests,
)

STORED_VIEW_BYTES = 123_000
"""A stored view of 224 px: the mean of 64 JPEGs of ImageNet, compressed four at a time."""

LIST_KEYS = 1000
"""Keys of one page of a listing."""

RENDER_RATE = 360
"""Views at 224 px that a core renders per second, measured on 64 JPEGs of ImageNet."""


class Project(NamedTuple):
    """A dataset and the number of seeds to record."""

    title: str
    num_samples: int
    num_classes: int
    num_seeds: int


PROJECTS = (
    Project("ImageNet-1k, 300 seeds", 1_281_167, 1_000, 300),
    Project("ImageNet-21k, 90 seeds", 14_197_122, 21_841, 90),
)

CODECS: dict[str, dict[str, Any]] = {
    "dense": {"kind": "dense"},
    "int8": {"kind": "int8"},
    "topk 10": {"kind": "topk", "k": 10},
    "topk 50": {"kind": "topk", "k": 50},
    "features 1024": {"kind": "features", "num_channels": 1024},
    "features 2048": {"kind": "features", "num_channels": 2048},
}


def layout_of(project: Project, codec: dict[str, Any]) -> CacheLayout:
    """The layout that a build of whole images at 224 px chooses by default."""
    parts = {
        "dataset": DatasetId(
            name="folder",
            split="train",
            num_samples=project.num_samples,
            num_classes=project.num_classes,
            sha256="0" * 64,
        ),
        "recipe": AugmentConfig(size=224, preset="imagenet").recipe(),
        "teacher": TeacherId(
            model="teacher",
            weights_sha256="0" * 64,
            num_classes=project.num_classes,
            preprocess=Preprocess(size=224, mean=(0.5,) * 3, std=(0.5,) * 3),
            map_side=7,
            affine_head=True,
        ),
        "scales": (1,),
        "stored_scales": (1,),
        "codec": codec,
    }
    row_bytes = CacheLayout(
        CacheSpec.model_validate({**parts, "layout": Layout(shard_rows=2, chunk_rows=2)})
    ).row_bytes
    layout = default_layout(row_bytes, project.num_samples)
    return CacheLayout(CacheSpec.model_validate({**parts, "layout": layout}))


def storage() -> str:
    """Rows, shards, objects and bytes of each codec."""
    lines = [
        (
            "| recording | B a row | rows a shard | shards | objects | total, TB | stored views | "
            "commits, GB | pages of a listing |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for project in PROJECTS:
        for name, codec in CODECS.items():
            layout = layout_of(project, codec)
            shards = project.num_seeds * layout.spec.num_shards
            total = project.num_seeds * seed_bytes(layout, STORED_VIEW_BYTES)
            witnesses = shards * layout.witness_shape[0] * STORED_VIEW_BYTES
            lines.append(
                f"| {project.title}, {name} | {layout.row_bytes:,} | "
                f"{layout.spec.layout.shard_rows:,} | {shards:,} | "
                f"{num_objects(layout, shards):,} | {total / 1e12:.2f} | "
                f"{witnesses / total:.1%} | {shards * commit_bytes(layout) / 1e9:.1f} | "
                f"{-(-shards // LIST_KEYS):,} |"
            )
    return "\n".join(lines)


def reading() -> str:
    """What a student reads in an epoch."""
    lines = [
        (
            "| recording | GB an epoch | requests of a bucket, once per computer | requests of a "
            "server with `disk_cache` | of a server at batch 1024 |"
        ),
        "|---|---|---|---|---|",
    ]
    for project in PROJECTS:
        for name, codec in CODECS.items():
            layout = layout_of(project, codec)
            rows = sum(layout.row_object_bytes(n) for n in range(layout.spec.num_shards))
            lines.append(
                f"| {project.title}, {name} | {rows / 1e9:.1f} | {bucket_requests(layout):,} | "
                f"{server_requests(layout):,} | {-(-project.num_samples // 1024):,} |"
            )
    return "\n".join(lines)


def computing() -> str:
    """Hours of teachers and of rendering, and the cores that keep a GPU busy."""
    lines = [
        (
            "| recording | views | rendering, core hours | teacher at 500 views/s: GPU hours, "
            "cores a GPU | at 2,000 views/s | at 5,000 views/s |"
        ),
        "|---|---|---|---|---|---|",
    ]
    for project in PROJECTS:
        views = project.num_samples * project.num_seeds
        rates = [
            f"{views / rate / 3600:,.0f} h, {max(1, -(-rate // RENDER_RATE))}"
            for rate in (500, 2_000, 5_000)
        ]
        lines.append(
            f"| {project.title} | {views / 1e6:,.0f} million | "
            f"{views / RENDER_RATE / 3600:,.0f} | {' | '.join(rates)} |"
        )
    return "\n".join(lines)
