"""A build file: everything that `kd-cache build` needs to know."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from cache_service.config import Frozen
from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.errors import ConfigError
from cache_service.format.codecs import Codec, DenseCodec
from cache_service.format.recipe import AugmentConfig
from cache_service.format.seeds import Seeds, parse_seeds
from cache_service.format.spec import Layout, Scales
from cache_service.teacher.settings import TeacherConfig


class BuildConfig(Frozen):
    """One recording: images, views, teacher, and how its logits are stored.

    The first block of settings is the identity of the cache. The second says how the work is done.
    """

    cache: Annotated[str, Field(min_length=1, description="A path or s3://bucket/prefix.")]
    dataset: DatasetConfig
    augment: AugmentConfig
    teacher: TeacherConfig
    scales: Annotated[
        Scales, Field(description="Sides of the grids of cells; 1 is the whole image.")
    ] = (1,)
    codec: Codec = DenseCodec()
    layout: Annotated[
        Layout | None, Field(description="Rows per shard and per chunk; worked out if absent.")
    ] = None

    seeds: Annotated[Seeds, Field(description="Seeds to record, such as 0:30.")]
    batch_size: Annotated[int, Field(ge=1, le=65536, description="Views per teacher batch.")] = 256
    workers: Annotated[
        int | None, Field(ge=0, le=256, description="Rendering processes; 0 renders in line.")
    ] = None
    threads: Annotated[
        int | None, Field(ge=1, le=1024, description="CPU threads of the teacher.")
    ] = None
    device: Annotated[str, Field(min_length=1, description="auto, cpu, cuda, cuda:1, ...")] = "auto"
    processes: Annotated[int, Field(ge=1, le=64, description="Builders on this machine.")] = 1
    stall_s: Annotated[
        float, Field(gt=0, description="A builder without progress for so long is replaced, s.")
    ] = 600.0

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
        """The seeds to record now, and the config whose seeds include them.

        Seeds beyond those of the file extend the cache: its arrays grow.

        Args:
            text: such as 0:8; None for the seeds of the file.

        Raises:
            ConfigError: `text` is not of that form.
        """
        if text is None:
            return self.seeds, self
        try:
            chosen = parse_seeds(text)
        except ValueError as problem:
            raise ConfigError(f"--seeds: {problem}") from problem
        every = tuple(sorted({*self.seeds, *chosen}))
        return chosen, self.model_copy(update={"seeds": every})
