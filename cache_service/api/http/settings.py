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

MAX_SEEDS = 1000
"""Requested seeds are below this: more epochs than students train for, and a typo that adds digits
would fill the disk."""

MAX_VIEW_SIZE = 512
"""Largest side of a requested view, px. The cost of a request grows with its square."""

MAX_OPS = 16
"""Ops of one requested recipe; the longest preset has six."""

MAX_KEPT = 1000
"""Finished builds that stay listed, a few kilobytes each."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$")]


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
    max_queued: int = Field(
        100, ge=1, le=100_000, description="Builds in the queue; one more is refused with 429."
    )

    @model_validator(mode="before")
    @classmethod
    def _constants_are_not_set(cls, builds: Any) -> Any:
        if isinstance(builds, dict) and "limits" in builds:
            constants = {
                "max_seeds": MAX_SEEDS,
                "max_view_size": MAX_VIEW_SIZE,
                "max_ops": MAX_OPS,
                "max_kept": MAX_KEPT,
            }
            _without_constants(builds["limits"], constants)
            raise ValueError("limits is no section of `builds`; write `builds: {max_queued: ...}`")
        return builds

    @field_validator("devices")
    @classmethod
    def _devices_are_distinct(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(devices)) != len(devices):
            raise ValueError(f"names a device twice: {', '.join(devices)}")
        return devices


def _without_constants(section: Any, constants: Mapping[str, object]) -> Any:
    """Refuse a section that sets what is a constant of the service, and say its value."""
    for key, value in constants.items():
        if isinstance(section, dict) and key in section:
            raise ValueError(f"{key} is a constant of the service, {value}; leave it out")
    return section


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
    """What this machine gives to all requests together. Limits of one request are constants."""

    max_connections: int = Field(1000, ge=1, le=65536, description="Connections open at a time.")
    max_inflight: int = Field(
        128,
        ge=1,
        le=65536,
        description="Requests in flight at a time; half of them may wait for a running build.",
    )
    max_answer_bytes: int = Field(
        256 << 20, ge=1 << 16, le=1 << 40, description="Memory of large responses at a time, bytes."
    )
    threads: int = Field(
        8, ge=1, le=256, description="Threads that read storage; more help with a bucket."
    )
    wait_max_s: float = Field(
        30.0,
        ge=0,
        le=3600,
        description="Longest wait for rows of a running build, s; below the timeout of a proxy.",
    )


class ServiceLimits(Limits):
    """The limits of a serve file and the constants beside them, which only tests change."""

    max_rows: int = 16_384
    # Rows of one response: four times what the package's own client requests.
    max_response_bytes: int = 64 << 20
    # Of one response with rows: eight times what that client requests. Larger responses are not
    # faster, and a connection that breaks costs all of it again.
    max_body_bytes: int = 1 << 20
    # A lookup of `max_rows` samples has 64 KiB in binary and less than 200 KiB as JSON.
    max_header_bytes: int = 32 << 10
    # Of an address and its headers together; those of the package's own client are below 1 KiB.
    max_streams: int = 64
    # Event streams open at a time. They are apart from `max_inflight`, because they stay open.
    open_shards: int = 256
    # Shards of one cache that stay mapped, one open file each.
    header_timeout_s: float = 5.0
    # For the address and headers to arrive, s. A body gets more, by its size.
    send_timeout_s: float = 30.0
    # For a client to take a part of a response, s.
    keep_alive_s: int = 30
    # An unused connection stays open, s; a student asks again sooner.

    @property
    def max_waiting(self) -> int:
        """Requests that wait for a build; the other half of the slots stays for recorded rows."""
        return self.max_inflight // 2


_LIMIT_CONSTANTS: dict[str, object] = {
    **{
        name: field.default
        for name, field in ServiceLimits.model_fields.items()
        if name not in Limits.model_fields
    },
    "max_waiting": "half of max_inflight",
}


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

    @field_validator("limits", mode="before")
    @classmethod
    def _constants_are_not_set(cls, limits: Any) -> Any:
        return _without_constants(limits, _LIMIT_CONSTANTS)

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
