"""`builds:` of a serve file: which teachers and datasets may be named, where builds run, limits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from cache_service.datasets.config import DatasetConfig
from cache_service.format.frozen import Frozen
from cache_service.teacher.config import TeacherConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")]


class BuildLimits(Frozen):
    """What one request, and all of them together, may ask for."""

    max_queued: Annotated[int, Field(ge=1, le=100_000, description="Builds that wait.")] = 100
    max_kept: Annotated[
        int, Field(ge=1, le=100_000, description="Finished builds that are remembered.")
    ] = 1000
    max_seeds: Annotated[
        int, Field(ge=1, le=100_000, description="Every seed asked for is below this.")
    ] = 1000
    max_view_size: Annotated[
        int, Field(ge=8, le=4096, description="Largest side of a view, px.")
    ] = 512
    max_ops: Annotated[int, Field(ge=1, le=256, description="Ops of one recipe.")] = 16


class BuildsConfig(Frozen):
    """Builds that the service runs. A request names its teacher and dataset from these lists."""

    teachers: dict[Name, TeacherConfig] = Field(
        default_factory=dict,
        description="By name, each as the `teacher:` section of a build file.",
    )
    datasets: dict[Name, DatasetConfig] = Field(
        default_factory=dict,
        description="By name, each as the `dataset:` section of a build file.",
    )
    devices: Annotated[
        tuple[Device, ...],
        Field(min_length=1, description="One worker process each: cpu, cuda:0, ..."),
    ] = ("auto",)
    database: Annotated[
        str | None,
        Field(min_length=1, description="SQLite file; ROOT/.kd-cache/builds.sqlite if absent."),
    ] = None
    batch_size: Annotated[int, Field(ge=1, le=65536, description="Views per teacher batch.")] = 256
    workers: Annotated[
        int | None, Field(ge=0, le=256, description="Rendering processes; 0 renders in line.")
    ] = None
    threads: Annotated[
        int | None, Field(ge=1, le=1024, description="CPU threads of the teacher.")
    ] = None
    stall_s: Annotated[
        float, Field(gt=0, description="A worker without progress for so long is replaced, s.")
    ] = 600.0
    limits: BuildLimits = BuildLimits()

    @field_validator("devices")
    @classmethod
    def _devices_are_distinct(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(devices)) != len(devices):
            raise ValueError(f"names a device twice: {', '.join(devices)}")
        return devices
