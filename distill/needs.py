"""What the methods of a run need of its stream, put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError
from cache_service.format.seeds import describe_seeds
from distill.methods import MethodSettings, Needs, method_of


def needs_of(methods: Sequence[MethodSettings]) -> Needs:
    """What a stream must have for all of these.

    Raises:
        ConfigError: they need epochs of different samples.
    """
    wanted = [method_of(settings).needs(settings) for settings in methods]
    special = {needs.special for needs in wanted}
    if len(special) > 1:
        asked = "; ".join(
            f"{settings.name} {'all samples' if needs.special is None else list(needs.special)}"
            for settings, needs in zip(methods, wanted, strict=True)
        )
        raise ConfigError(
            f"the students have one stream, but need epochs of different classes: {asked}.",
            hint="Train each specialist by a train file of its own.",
        )
    return Needs(
        again=any(needs.again for needs in wanted),
        classmates=any(needs.classmates for needs in wanted),
        special=special.pop() if special else None,
    )


def refuse_unmet(needs: Needs, *, seeds: Sequence[int], labels_N: NDArray[np.integer]) -> None:
    """Refuse needs that a dataset and its seeds cannot meet.

    Raises:
        ConfigError: fewer than two seeds for two views, or no sample of the special classes.
    """
    if needs.again and len(set(seeds)) < 2:
        raise ConfigError(
            "two views of each sample are compared, which takes two seeds, but this run has only "
            f"{describe_seeds(sorted(set(seeds)))}.",
            hint="Record more with `kd-cache build FILE --seeds 0:2`, or name them in `seeds`.",
        )
    if needs.special is not None and not np.isin(labels_N, needs.special).any():
        raise ConfigError(f"the dataset has no sample of method.classes={list(needs.special)}.")
