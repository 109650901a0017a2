"""The settings of a build file, for `kd-cache build`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from cache_service.config import EXPANDED, Frozen
from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.errors import ConfigError
from cache_service.format.codecs import Codec, DenseCodec
from cache_service.format.recipe import AugmentConfig
from cache_service.format.seeds import Seeds, parse_seeds
from cache_service.format.spec import Layout, Scales
from cache_service.teacher.settings import TeacherConfig

SDD = "sdd"
SDD_SCALES = (1, 2, 4)
"""Grids of the published code of SDD, which pools the finest one whichever of them are used."""


class RayConfig(Frozen):
    """What `--engine ray` needs to know of its cluster. It changes no recorded byte."""

    num_cpus: Annotated[
        float | None, Field(gt=0, le=4096, description="CPUs a process. Null: 1 + `workers`.")
    ] = None
    num_gpus: Annotated[
        float | None,
        Field(ge=0, le=64, description="GPUs a process. Null: 1 if `device` wants one, else 0."),
    ] = None
    env: Annotated[
        tuple[str, ...],
        Field(description="Environment variables to pass on, such as AWS_ACCESS_KEY_ID."),
    ] = ()
    working_dir: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Folder that Ray copies to every machine, with modules of your own.",
        ),
        EXPANDED,
    ] = None


class BuildConfig(Frozen):
    """The settings of a recording.

    The first block of settings determines the identity of the cache. The second block configures
    how it is recorded.
    """

    cache: Annotated[
        str, Field(min_length=1, description="A path or s3://bucket/prefix."), EXPANDED
    ]
    dataset: DatasetConfig
    augment: AugmentConfig
    teacher: TeacherConfig
    scales: Annotated[
        Scales,
        Field(
            description="Cells per side of each grid; 1 is the whole image. `sdd` stands for "
            "[1, 2, 4] with `teacher.pooling: chained`."
        ),
    ] = (1,)
    codec: Codec = DenseCodec()
    layout: Annotated[
        Layout | None,
        Field(
            description="Rows per shard and chunk. Null: those of the cache that is there, else "
            "at least 16 shards a seed of 512 to 32768 rows, and at most 64 MiB each."
        ),
    ] = None

    seeds: Annotated[Seeds, Field(description="Seeds to record, such as 0:30.")]
    batch_size: Annotated[int, Field(ge=1, le=65536, description="Views per teacher batch.")] = 256
    workers: Annotated[
        int | None, Field(ge=0, le=256, description="Rendering processes; 0: in the main process.")
    ] = None
    threads: Annotated[
        int | None, Field(ge=1, le=1024, description="CPU threads of the teacher.")
    ] = None
    device: Annotated[str, Field(min_length=1, description="auto, cpu, cuda, cuda:1, ...")] = "auto"
    processes: Annotated[int, Field(ge=1, le=1024, description="Worker processes.")] = 1
    ray: RayConfig = RayConfig()
    stall_s: Annotated[
        float, Field(gt=0, description="Restart workers after this time without progress, s.")
    ] = 600.0

    @model_validator(mode="before")
    @classmethod
    def _expand_sdd(cls, written: Any) -> Any:
        """`scales: sdd` is the grids and the pooling of the published code of SDD."""
        if not isinstance(written, dict) or written.get("scales") != SDD:
            return written
        teacher = written.get("teacher")
        if not isinstance(teacher, dict):
            return written | {"scales": SDD_SCALES}
        if teacher.get("pooling", "chained") != "chained":
            raise ValueError(
                f"scales: {SDD} pools every grid from the finest one, but teacher.pooling is "
                f"{teacher['pooling']!r}; leave it out, or write scales: {list(SDD_SCALES)}"
            )
        return written | {"scales": SDD_SCALES, "teacher": teacher | {"pooling": "chained"}}

    @field_validator("scales")
    @classmethod
    def _scales_start_at_one(cls, scales: tuple[int, ...]) -> tuple[int, ...]:
        if scales[0] != 1 or list(scales) != sorted(set(scales)):
            raise ValueError(
                f"must start at 1 and strictly increase, got {list(scales)}: cell 0 is the whole "
                "image"
            )
        return scales

    def choose_seeds(self, text: str | None) -> tuple[tuple[int, ...], BuildConfig]:
        """Return the seeds to record now, and a config whose seeds include them.

        Seeds that are not in the file extend the arrays of the cache.

        Args:
            text: seeds such as 0:8; None for the seeds of the file.

        Raises:
            ConfigError: `text` has another form.
        """
        if text is None:
            return self.seeds, self
        try:
            chosen = parse_seeds(text)
        except ValueError as problem:
            raise ConfigError(f"--seeds: {problem}") from problem
        every = tuple(sorted({*self.seeds, *chosen}))
        return chosen, self.model_copy(update={"seeds": every})
