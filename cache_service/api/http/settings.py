"""The serve file: where the caches are, tokens, limits, and what may be built on request."""

from __future__ import annotations

import io
import ipaddress
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from cache_service.config import (
    EXPANDED,
    Frozen,
    override_document,
    parse_yaml,
    read_document,
    validate_config,
)
from cache_service.datasets.dataset_config import DatasetConfig
from cache_service.errors import ConfigError
from cache_service.teacher.settings import TeacherConfig

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")]


class BuildLimits(Frozen):
    """Limits of one request for a build, and of all of them together."""

    max_queued: int = Field(100, ge=1, le=100_000, description="Builds in the queue.")
    max_kept: int = Field(1000, ge=1, le=100_000, description="Finished builds that stay listed.")
    max_seeds: int = Field(1000, ge=1, le=100_000, description="Requested seeds are below this.")
    max_view_size: int = Field(512, ge=8, le=4096, description="Largest side of a view, px.")
    max_ops: int = Field(16, ge=1, le=256, description="Ops of one recipe.")


class BuildsConfig(Frozen):
    """Builds that the service runs. A request names its teacher and dataset from these lists."""

    teachers: dict[Name, TeacherConfig] = Field(
        {}, description="By name, each as the `teacher:` section of a build file."
    )
    datasets: dict[Name, DatasetConfig] = Field(
        {}, description="By name, each as the `dataset:` section of a build file."
    )
    devices: tuple[Device, ...] = Field(
        ("auto",), min_length=1, description="One worker process each: cpu, cuda:0, ..."
    )
    database: Annotated[str | None, EXPANDED] = Field(
        None, min_length=1, description="SQLite file; ROOT/.kd-cache/builds.sqlite if absent."
    )
    batch_size: int = Field(256, ge=1, le=65536, description="Views per teacher batch.")
    workers: int | None = Field(
        None, ge=0, le=256, description="Rendering processes; 0 renders in line."
    )
    threads: int | None = Field(None, ge=1, le=1024, description="CPU threads of the teacher.")
    stall_s: float = Field(
        600.0, gt=0, description="A worker without progress for this long is replaced, s."
    )
    limits: BuildLimits = BuildLimits()

    @field_validator("devices")
    @classmethod
    def _devices_are_distinct(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(devices)) != len(devices):
            raise ValueError(f"names a device twice: {', '.join(devices)}")
        return devices


Scope = Literal["read", "build"]

SHA256 = r"^[0-9a-f]{64}$"


def _sha256(value: Any) -> Any:
    """Refuse a value that is no SHA-256, without repeating it: it may be the token itself."""
    if not isinstance(value, str) or not re.fullmatch(SHA256, value):
        raise ValueError(
            "is not 64 hexadecimal digits. Use the sha256 that `kd-cache token` prints; "
            "the token itself is for the client"
        )
    return value


class TokenConfig(Frozen):
    """One access token, by its SHA-256; the token itself is not stored."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Name of its owner."
    )
    sha256: Annotated[str, BeforeValidator(_sha256)] = Field(
        pattern=SHA256, description="As `kd-cache token` prints it."
    )
    scopes: tuple[Scope, ...] = Field(
        min_length=1, description="read: rows and pages; build: builds."
    )


class Limits(Frozen):
    """Limits of one request, and of all of them together."""

    max_rows: int = Field(16384, ge=1, le=1 << 20, description="Rows of one response.")
    max_response_bytes: int = Field(
        64 << 20, ge=1 << 10, le=1 << 30, description="Bytes of one response with rows."
    )
    max_answer_bytes: int = Field(
        256 << 20, ge=1 << 16, le=1 << 40, description="Bytes of large responses at a time."
    )
    max_body_bytes: int = Field(
        1 << 20, ge=1 << 10, le=1 << 28, description="Bytes of a request's body."
    )
    max_header_bytes: int = Field(
        32 << 10, ge=1 << 10, le=1 << 24, description="Bytes of a request's address and headers."
    )
    max_inflight: int = Field(128, ge=1, le=65536, description="Requests in flight at a time.")
    max_waiting: int = Field(
        64, ge=0, le=65536, description="Of those, requests that wait for a running build."
    )
    max_streams: int = Field(64, ge=1, le=65536, description="Event streams open at a time.")
    max_connections: int = Field(1000, ge=1, le=65536, description="Connections open at a time.")
    threads: int = Field(8, ge=1, le=256, description="Threads that read storage.")
    open_shards: int = Field(256, ge=1, le=4096, description="Shards of a cache that stay mapped.")
    wait_max_s: float = Field(
        30.0, ge=0, le=3600, description="Longest wait for rows of a running build, s."
    )
    header_timeout_s: float = Field(
        5.0, gt=0, le=600, description="For a request to arrive, s; a body gets more."
    )
    send_timeout_s: float = Field(
        30.0, gt=0, le=3600, description="For a client to read a part of a response, s."
    )
    keep_alive_s: int = Field(30, ge=1, le=3600, description="An unused connection stays open, s.")


class ServeConfig(Frozen):
    """The settings of a service."""

    root: str = Field(
        min_length=1, description="Folder or bucket prefix; caches lie directly below it."
    )
    host: str = Field(
        "127.0.0.1", min_length=1, description="Address to listen on; beyond loopback needs tokens."
    )
    port: int = Field(
        8000, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one."
    )
    prefix: str = Field(
        "", description="Path below which a proxy serves this service, such as `/kd`."
    )
    trust_proxy: bool = Field(
        False,
        description="Believe a proxy's X-Forwarded-Prefix and X-Forwarded-For: only if every "
        "request comes through it.",
    )
    tokens: tuple[TokenConfig, ...] = Field(
        (), description="Accepted tokens; none: open to everybody."
    )
    datasets: dict[Name, DatasetConfig] = Field(
        {},
        description="Datasets that the pages may open to show images, by any name, each as the "
        "`dataset:` section of a build file. Those of `builds.datasets` need not be repeated.",
    )
    limits: Limits = Limits()
    builds: BuildsConfig | None = Field(None, description="What may be built; without it, nothing.")

    @field_validator("prefix")
    @classmethod
    def _prefix_is_a_path(cls, prefix: str) -> str:
        prefix = prefix.rstrip("/")
        if prefix and not is_prefix(prefix):
            raise ValueError(
                f"{prefix[:80]!r} is no prefix: write a path such as /kd, of letters, digits and "
                f"._~-, that does not begin with one of this service's own: {', '.join(OWN_PATHS)}"
            )
        return prefix

    @model_validator(mode="after")
    def _closed_or_local(self) -> Self:
        names = [token.name for token in self.tokens]
        if len(set(names)) != len(names):
            raise ValueError(f"tokens: two of them have the same name: {', '.join(sorted(names))}")
        if not self.tokens and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, but `tokens` is empty: "
                "create a token with `kd-cache token`, or listen on 127.0.0.1"
            )
        return self


OWN_PATHS = ("v1", "caches", "static", "login", "healthz", "readyz", "metrics", "openapi.json")
"""First parts of the service's own paths."""

_PREFIX = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]{0,63}){1,8}", re.ASCII)


def is_prefix(path: str) -> bool:
    """Whether a service can be served below a path, without a slash at its end."""
    return _PREFIX.fullmatch(path) is not None and path.split("/")[1] not in OWN_PATHS


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address. Names other than localhost do not count."""
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
    """Load the configuration of `kd-cache serve ROOT`.

    Args:
        root: where the caches are.
        file: YAML with the other keys of `ServeConfig`.
        overrides: `a.b=value` each.
        given: options of the command line, which override the file. None means not given.

    Raises:
        ConfigError: a key or a value is invalid, or the address is open and no token is set.
    """
    document = read_document(file, overrides) if file else override_document({}, overrides)
    options = {key: value for key, value in (given or {}).items() if value is not None}
    where = str(file) if file else "kd-cache serve"
    return validate_config(ServeConfig, {**document, "root": root, **options}, where=where)


def add_token(file: str | Path, token: TokenConfig) -> None:
    """Add a token to a serve file, which is made if there is none. Its comments stay.

    Raises:
        ConfigError: the file is no serve file, has a token of that name, or cannot be written.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    path = Path(file)
    yaml: Any = YAML()  # keeps comments and the order of keys
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    document: Any = CommentedMap()
    if path.exists():
        load_serve_config("caches", path)  # refuses what is no serve file, in words
        document = yaml.load(path.read_text(encoding="utf-8")) or CommentedMap()
    entry = CommentedMap(token.model_dump(mode="json"))
    entry.fa.set_flow_style()
    entry["scopes"] = CommentedSeq(token.scopes)
    entry["scopes"].fa.set_flow_style()
    tokens = document.get("tokens") or CommentedSeq()
    document["tokens"] = CommentedSeq([*tokens, entry])
    text = io.StringIO()
    yaml.dump(document, text)
    try:
        _check_tokens(text.getvalue(), path)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(text.getvalue(), encoding="utf-8")
        temporary.replace(path)
    except OSError as problem:
        raise ConfigError(f"{path} cannot be written: {problem.strerror}.") from problem


def _check_tokens(text: str, path: Path) -> None:
    document = {"root": "caches", **parse_yaml(text, where=str(path))}
    validate_config(ServeConfig, document, where=str(path))
