"""The ways in which a student is trained in a benchmark: from labels, from a cache, or live."""

from __future__ import annotations

from typing import NamedTuple

from cli.experiments.bench.pairs import Pair


class Variant(NamedTuple):
    """One way to train the student of a pair.

    Attributes:
        title: for tables.
        method: name of the method.
        teacher: where the teacher's logits come from, if the method takes any.
    """

    title: str
    method: str
    teacher: str

    @property
    def has_cells(self) -> bool:
        """Whether the method compares cells of the feature maps."""
        return self.method.startswith("sd-")


LABELS = Variant("labels alone", "ce", "none")
CACHE_KD = Variant("cache, KD", "kd", "cache")
LIVE_KD = Variant("live teacher, KD", "kd", "live")
CACHE_SDD = Variant("cache, SD-KD", "sd-kd", "cache")
LIVE_SDD = Variant("live teacher, SD-KD", "sd-kd", "live")

FROM_CACHE = (CACHE_KD.title, CACHE_SDD.title)


def variants_of(pair: Pair) -> list[Variant]:
    """Return the variants of a pair, that on labels alone first."""
    whole = [LABELS, CACHE_KD, LIVE_KD]
    return [*whole, CACHE_SDD, LIVE_SDD] if pair.has_cells else whole
