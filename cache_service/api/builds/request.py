"""A request to record a cache, and the checks before it is queued. Does not load torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from cache_service.api.http.settings import MAX_OPS, MAX_SEEDS, MAX_VIEW_SIZE, BuildsConfig, Name
from cache_service.config import Frozen, suggest, validate_config
from cache_service.errors import ConfigError
from cache_service.format.codecs import Codec, DenseCodec
from cache_service.format.recipe import AugmentConfig
from cache_service.format.seeds import parse_seeds
from cache_service.format.spec import Layout, Scales
from cache_service.recording.build_config import BuildConfig


def parse_bounded_seeds(value: Any) -> tuple[int, ...]:
    """Do what `parse_seeds` does, but refuse a range of two billion before it costs memory.

    Raises:
        ValueError: these are no seeds, or more than the service accepts.
    """
    parts = value if isinstance(value, list | tuple) else [value]
    count = len(parts)
    for part in parts:
        if not isinstance(part, int | str):
            raise ValueError("seeds are written as 0:30, as 7, or as a list of those")
        first, _, last = str(part)[:40].partition(":")
        if first.isdecimal() and last.isdecimal():
            count += int(last) - int(first)
    if count > MAX_SEEDS:
        raise ValueError(f"names more than {MAX_SEEDS} seeds")
    return parse_seeds(value)


_SEED = {"type": "integer", "minimum": 0, "maximum": MAX_SEEDS - 1}

BoundedSeeds = Annotated[
    tuple[int, ...],
    BeforeValidator(parse_bounded_seeds),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": "^[0-9]{1,6}(:[0-9]{1,6})?$"},
                _SEED,
                {"type": "array", "minItems": 1, "maxItems": MAX_SEEDS, "items": _SEED},
            ],
            "description": "Seeds to record, such as 0:30.",
            "examples": ["0:30"],
        }
    ),
]


class BuildRequest(Frozen):
    """One recording, by names from the server's configuration."""

    teacher: Annotated[Name, Field(description="One of the server's teachers.")]
    dataset: Annotated[Name, Field(description="One of the server's datasets.")]
    cache: Annotated[Name, Field(description="The cache to create, extend or finish.")]
    augment: AugmentConfig
    seeds: BoundedSeeds
    scales: Annotated[Scales, Field(description="Sides of the grids of cells.")] = (1,)
    codec: Codec = DenseCodec()
    layout: Annotated[
        Layout | None, Field(description="Rows per shard and per chunk; computed if absent.")
    ] = None
    priority: Annotated[
        int, Field(ge=-100, le=100, description="Builds of a larger priority run first.")
    ] = 0

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that must be equal in two builds of one cache."""
        return self.model_dump(mode="json", exclude={"seeds", "priority"})


def build_config(
    request: BuildRequest, builds: BuildsConfig, *, cache_url: str, device: str
) -> BuildConfig:
    """The build file that a request stands for.

    Raises:
        ConfigError: a name is not listed, a limit is exceeded, or the build is not possible. The
            message repeats names of the server's configuration and nothing else of it.
    """
    _check_limits(request)
    document = {
        "cache": cache_url,
        "teacher": _listed(request.teacher, builds.teachers, "teacher"),
        "dataset": _listed(request.dataset, builds.datasets, "dataset"),
        "augment": request.augment,
        "scales": request.scales,
        "codec": request.codec,
        "layout": request.layout,
        "seeds": request.seeds,
        "batch_size": builds.batch_size,
        "workers": builds.workers,
        "threads": builds.threads,
        "device": device,
    }
    return validate_config(BuildConfig, document, where="this request")


def _listed(name: str, known: dict[str, Any], what: str) -> Any:
    if name not in known:
        suggestion = suggest(name, sorted(known))
        end = "" if suggestion.endswith("?") else "."
        raise ConfigError(
            f"{what} {name!r} is not one of this server's: {suggestion}{end}",
            hint=f"The operator of the server can add it under builds.{what}s.",
        )
    return known[name]


def _check_limits(request: BuildRequest) -> None:
    if request.augment.callable is not None:
        raise ConfigError(
            "augment.callable names code, which a request must not.",
            hint="Use augment.preset or augment.ops, or build with `kd-cache build`.",
        )
    num_ops = len(request.augment.ops or ())
    for what, requested, limit in (
        ("the largest seed", request.seeds[-1], MAX_SEEDS - 1),
        ("augment.size", request.augment.size, MAX_VIEW_SIZE),
        ("the number of augment.ops", num_ops, MAX_OPS),
    ):
        if requested > limit:
            raise ConfigError(
                f"{what} is {requested}; this server takes at most {limit}.",
                hint="Ask for less, or record it with `kd-cache build` on the server.",
            )
