"""`builds:` of a serve file: which teachers and datasets may be named, where builds run, limits.

What a service is told: where the caches are, who may ask, and how much of anything.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cache_service.configfile import override_document, read_document, validate_config
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


Scope = Literal["read", "build"]

SHA256 = r"^[0-9a-f]{64}$"


def _proof(found: Any) -> Any:
    """Refuse what is no SHA-256 without repeating it: it may be the token itself."""
    if not isinstance(found, str) or not re.fullmatch(SHA256, found):
        raise ValueError(
            "is not 64 hexadecimal digits. Put in the sha256 that `kd-cache token` prints; "
            "the token itself is for the client"
        )
    return found


class TokenConfig(Frozen):
    """One token: not the token itself, but what proves it."""

    name: Annotated[
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Whose it is.")
    ]
    sha256: Annotated[
        str,
        BeforeValidator(_proof),
        Field(pattern=SHA256, description="As `kd-cache token` prints it."),
    ]
    scopes: Annotated[
        tuple[Scope, ...], Field(min_length=1, description="read: rows, pages; build: builds.")
    ]


class Limits(Frozen):
    """How much of anything one request, or all of them together, may take."""

    max_rows: Annotated[int, Field(ge=1, le=1 << 20, description="Rows of one answer.")] = 16384
    max_response_bytes: Annotated[
        int, Field(ge=1 << 10, le=1 << 30, description="Bytes of one answer with rows.")
    ] = 64 << 20
    max_answer_bytes: Annotated[
        int, Field(ge=1 << 16, le=1 << 40, description="Bytes of large answers held at a time.")
    ] = 256 << 20
    max_body_bytes: Annotated[
        int, Field(ge=1 << 10, le=1 << 28, description="Bytes of a request's body.")
    ] = 1 << 20
    max_header_bytes: Annotated[
        int, Field(ge=1 << 10, le=1 << 24, description="Bytes of a request's address and headers.")
    ] = 32 << 10
    max_inflight: Annotated[
        int, Field(ge=1, le=65536, description="Requests that are answered at a time.")
    ] = 128
    max_waiting: Annotated[
        int, Field(ge=0, le=65536, description="Of those, requests that await a running build.")
    ] = 64
    max_streams: Annotated[
        int, Field(ge=1, le=65536, description="Event streams that are open at a time.")
    ] = 64
    max_connections: Annotated[
        int, Field(ge=1, le=65536, description="Connections that are open at a time.")
    ] = 1000
    threads: Annotated[int, Field(ge=1, le=256, description="Threads that read storage.")] = 8
    open_shards: Annotated[
        int, Field(ge=1, le=4096, description="Shards of one cache that are kept mapped.")
    ] = 256
    wait_max_s: Annotated[
        float, Field(ge=0, le=3600, description="Longest wait for rows of a running build, s.")
    ] = 30.0
    header_timeout_s: Annotated[
        float, Field(gt=0, le=600, description="For a request's headers to arrive, s.")
    ] = 5.0
    send_timeout_s: Annotated[
        float, Field(gt=0, le=3600, description="For a client to take a part of an answer, s.")
    ] = 30.0
    keep_alive_s: Annotated[
        int, Field(ge=1, le=3600, description="An unused connection is kept open, s.")
    ] = 30


class ServeConfig(Frozen):
    """A service."""

    root: Annotated[
        str,
        Field(min_length=1, description="Folder or bucket prefix; caches lie directly below it."),
    ]
    host: Annotated[
        str, Field(min_length=1, description="Address to listen on; beyond loopback needs tokens.")
    ] = "127.0.0.1"
    port: Annotated[
        int, Field(ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    ] = 8000
    tokens: Annotated[
        tuple[TokenConfig, ...], Field(description="Who may ask; empty lets everybody.")
    ] = ()
    limits: Limits = Limits()
    builds: Annotated[
        BuildsConfig | None, Field(description="What may be built here; without it, nothing.")
    ] = None

    @model_validator(mode="after")
    def _closed_or_local(self) -> Self:
        names = [token.name for token in self.tokens]
        if len(set(names)) != len(names):
            raise ValueError(f"tokens: two of them are named alike: {', '.join(sorted(names))}")
        if not self.tokens and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reached by other machines, and tokens lists none: make one "
                "with `kd-cache token`, or listen on 127.0.0.1"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. A name other than localhost may be anybody."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_serve_config(
    root: str,
    file: str | Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> ServeConfig:
    """The configuration of `kd-cache serve ROOT`.

    Args:
        root: where the caches are.
        file: YAML with the other keys of `ServeConfig`.
        overrides: `a.b=value` each.
        given: options of the command line; they win. None means not given.

    Raises:
        ConfigError: a key or a value is not usable, or the address is open and no token is set.
    """
    document = read_document(file, overrides) if file else override_document({}, overrides)
    options = {key: value for key, value in (given or {}).items() if value is not None}
    where = str(file) if file else "kd-cache serve"
    return validate_config(ServeConfig, {**document, "root": root, **options}, where=where)
