"""Every replayed view is held against what the teacher saw, before a student sees it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import SpecMismatchError, ViewDriftError
from cache_service.format.codecs import Arrays
from cache_service.remote.source import RowSource
from cache_service.views.identity import (
    WitnessDiff,
    accepts_drift,
    compare_views,
    explain_drift,
    library_versions,
)
from cache_service.views.replay import ViewBatch, Views


class ReplayGuard:
    """Compares replayed views with one cache's record of them.

    `max_drift` is how many levels (of 255) the witnesses may differ by where the source pixels and
    all draws are proven equal. 0 means none, which is the default everywhere.
    """

    def __init__(self, cache: RowSource, *, max_drift: int = 0) -> None:
        self._cache = cache
        self._max_drift = max_drift
        self._witness_diffs: dict[tuple[int, int], list[WitnessDiff]] = {}

    def check(
        self, views: Views, seed: int, positions: NDArray[np.int64], batch: ViewBatch, rows: Arrays
    ) -> None:
        """Refuse a batch in which any view is not the recorded one.

        Raises:
            SpecMismatchError: the recorded order is not the order replayed here.
            ViewDriftError: other pixels; says how far they moved and which library changed.
        """
        if not np.array_equal(rows["sample"], batch.samples_B):
            first = int(np.flatnonzero(rows["sample"] != batch.samples_B)[0])
            raise SpecMismatchError(
                f"{self._cache.url} has sample {int(rows['sample'][first])} at seed {seed}, "
                f"position {int(positions[first])}; replaying its order gives sample "
                f"{int(batch.samples_B[first])}."
            )
        moved = np.flatnonzero(rows["digest"] != batch.digests_B)
        if not len(moved):
            return
        origins_equal = bool(np.array_equal(rows["origin"][moved], batch.origins_B[moved]))
        for shard in np.unique(positions[moved] // self._cache.spec.layout.shard_rows).tolist():
            diffs = self._diffs(views, seed, shard)
            if self._accepts(origins_equal, diffs):
                continue
            first = int(moved[0])
            recorded = self._cache.commit(seed, shard).versions
            raise ViewDriftError(
                f"the view of sample {int(batch.samples_B[first])} (seed {seed}, position "
                f"{int(positions[first])}) is not what the teacher saw: {_cause(origins_equal)}; "
                f"{explain_drift(recorded, library_versions(), diffs)}.",
                hint=_advice(origins_equal),
            )

    def _accepts(self, origins_equal: bool, diffs: list[WitnessDiff]) -> bool:
        # Draws made inside a user's own callable are not in the origin: nothing proves them equal.
        if self._max_drift == 0 or self._cache.spec.recipe.callable is not None:
            return False
        return accepts_drift(
            origins_equal=origins_equal, witness_diffs=diffs, max_drift=self._max_drift
        )

    def _diffs(self, views: Views, seed: int, shard: int) -> list[WitnessDiff]:
        """How far each witness of a shard, replayed now, is from the recorded one."""
        known = self._witness_diffs.get((seed, shard))
        if known is None:
            recorded = self._cache.witnesses(seed, shard)
            replayed = views.render(
                seed, self._cache.group.layout.witness_positions(shard)
            ).pixels_BHW3
            known = [compare_views(*pair) for pair in zip(recorded, replayed, strict=True)]
            self._witness_diffs = {(seed, shard): known}
        return known


def _cause(origins_equal: bool) -> str:
    if origins_equal:
        return "its image and its draws are the recorded ones, so only the rendering changed"
    return "its image or its draws are other ones"


def _advice(origins_equal: bool) -> str:
    if not origins_equal:
        return "Train on the dataset that was recorded, or record this one."
    return (
        "Install the recorded versions, record again, or let rounding through by decision with "
        "`replay: {max_drift: 4}`."
    )
