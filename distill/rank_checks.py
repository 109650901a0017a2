"""Refuses what several processes cannot train, or would train differently from each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cache_service.errors import ConfigError, SpecMismatchError, UnsupportedError
from distill.config import TrainConfig
from distill.ranks import Ranks
from distill.stream import Stream

LOCAL: dict[str, Any] = {
    **dict.fromkeys(("dataset", "caches", "out", "device", "loader", "workers"), True),
    "evaluate": {"dataset"},
}
"""Settings with paths and hardware, which may differ from machine to machine."""


def refuse_on_ranks(configs: Mapping[str, TrainConfig], ranks: Ranks) -> None:
    """Refuse settings that several processes cannot train by, or that differ among them.

    Raises:
        UnsupportedError, ConfigError: see the message.
    """
    for config in configs.values():
        if ranks.world > 1 and config.compile:
            raise UnsupportedError(
                f"compile: true is not possible on {ranks.world} processes: compiled code cannot "
                "exchange the statistics of a batch.",
                hint="Use `--set compile=false`.",
            )
        if config.batch_size < 2 * ranks.world and ranks.world > 1:
            raise ConfigError(
                f"batch_size={config.batch_size} is the number of views for all {ranks.world} "
                "processes together, and at least two for each process are required.",
                hint=f"Use `--set batch_size={2 * ranks.world}` or more, or fewer processes.",
            )
    own = {name: config.model_dump(mode="json", exclude=LOCAL) for name, config in configs.items()}
    first = ranks.on_first(lambda: own)
    if own != first:
        raise ConfigError(
            f"rank {ranks.rank} has other settings than rank 0: {_difference(own, first)}.",
            hint="Give all machines the same train file and the same options.",
        )


def refuse_other_stream(stream: Stream, ranks: Ranks) -> None:
    """Refuse a stream that is not this rank's part of what rank 0 has.

    Raises:
        ConfigError: its plan is of another rank.
        SpecMismatchError: rank 0 reads other data.
    """
    plan, identity = stream.facts.plan, stream.facts.identity
    if (plan.rank, plan.world) != (ranks.rank, ranks.world):
        raise ConfigError(
            f"the stream is of rank {plan.rank} of {plan.world}, but this process is rank "
            f"{ranks.rank} of {ranks.world}.",
            hint="Give its BatchPlan `rank` and `world`.",
        )
    first = ranks.on_first(lambda: identity)
    if identity != first:
        raise SpecMismatchError(
            f"rank {ranks.rank} reads other data than rank 0: {_difference(identity, first)}.",
            hint="All machines need the same dataset and the same caches; if one was being "
            "recorded, run the same command again.",
        )


def _difference(own: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    key = next(key for key in {**own, **first} if own.get(key) != first.get(key))
    here, there = own.get(key), first.get(key)
    if isinstance(here, dict) and isinstance(there, dict):
        return _difference(here, there)
    return f"{key} is {here} here and {there} there"
