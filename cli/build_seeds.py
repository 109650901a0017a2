"""Which of a build file's seeds this run records."""

from __future__ import annotations

from cache_service.errors import ConfigError
from cache_service.format.seeds import parse_seeds
from cache_service.recording.config import BuildConfig


def chosen_seeds(config: BuildConfig, written: str | None) -> tuple[tuple[int, ...], BuildConfig]:
    """The seeds to record now, and the config whose seeds hold them.

    Seeds beyond the file's extend the cache: the arrays grow to hold them.

    Raises:
        ConfigError: `written` is not of the form 0:8.
    """
    if written is None:
        return config.seeds, config
    try:
        chosen = parse_seeds(written)
    except ValueError as problem:
        raise ConfigError(f"--seeds: {problem}") from problem
    every = tuple(sorted({*config.seeds, *chosen}))
    return chosen, config.model_copy(update={"seeds": every})
