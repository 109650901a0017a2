"""What to say, and what to accept, when a replayed view is not the recorded one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

ROUNDING_LEVELS = 8
"""Largest difference that still reads as rounding, of 255. Pillow 12 and 13 resize up to 4 levels
apart; another crop, flip or image differs by tens of levels in most pixels."""


class WitnessDiff(NamedTuple):
    """How far a replayed view is from the recorded view of the same position."""

    max_levels: int
    """Largest absolute difference of a color value, 0 to 255."""
    changed_share: float
    """Share of the pixels that differ in any color."""


def compare_views(recorded_HW3: NDArray[np.uint8], replayed_HW3: NDArray[np.uint8]) -> WitnessDiff:
    """The difference of two views of one shape."""
    levels_HW = np.abs(recorded_HW3.astype(np.int16) - replayed_HW3).max(axis=-1)
    return WitnessDiff(int(levels_HW.max()), float((levels_HW > 0).mean()))


def accepts_drift(
    *, origins_equal: bool, witness_diffs: Sequence[WitnessDiff], max_drift: int
) -> bool:
    """Whether replayed views may stand in for the recorded ones.

    Only where the decoded images and the draws are the same (so nothing but rendering changed),
    and every witness stays within `max_drift` levels. Without a witness there is no proof.
    """
    if not (origins_equal and witness_diffs):
        return False
    return all(diff.max_levels <= max_drift for diff in witness_diffs)


def explain_drift(
    recorded: Mapping[str, str], present: Mapping[str, str], witness_diffs: Sequence[WitnessDiff]
) -> str:
    """One sentence: how large the difference is, and which library changed, if one did."""
    return f"{_describe_diffs(witness_diffs)}; {_describe_change(recorded, present)}"


def _describe_diffs(witness_diffs: Sequence[WitnessDiff]) -> str:
    if not witness_diffs:
        return "there is no witness to compare with"
    levels = max(diff.max_levels for diff in witness_diffs)
    share = max(diff.changed_share for diff in witness_diffs)
    if levels == 0:
        return "the witnesses are replayed exactly, so only some views changed"
    kind = "rounding" if levels <= ROUNDING_LEVELS else "another crop or other pixels, not rounding"
    extent = f"{100 * share:.1f} %" if share >= 0.0005 else "under 0.1 %"
    plural = "" if levels == 1 else "s"
    return f"{kind} (at most {levels} level{plural} in {extent} of pixels)"


def _describe_change(recorded: Mapping[str, str], present: Mapping[str, str]) -> str:
    changes = [
        f"{name} was {recorded.get(name, 'absent')} at recording and is "
        f"{present.get(name, 'absent')} here"
        for name in sorted(recorded.keys() | present.keys())
        if recorded.get(name) != present.get(name)
    ]
    return ", ".join(changes) or "no library that renders views changed"
