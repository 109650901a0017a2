"""What identifies a view: its digest, the libraries that render it, and how far a replay may
drift."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import features
from torchvision.version import __version__ as torchvision_version

from cache_service.format.recipe import Recipe

ROUNDING_LEVELS = 8
"""Largest difference that still reads as rounding, of 255. Pillow 12 and 13 resize up to 4 levels
apart; another crop, flip or image differs by tens of levels in most pixels."""


def digest64(*parts: bytes | NDArray[Any]) -> int:
    """BLAKE2b of the parts' bytes, one after the other, 8 bytes long: a little-endian uint64.

    Arrays must be contiguous. Boundaries between parts are not hashed, so their sizes must be
    fixed.
    """
    state = blake2b(digest_size=8)
    for part in parts:
        state.update(part.data if isinstance(part, np.ndarray) else part)
    return int.from_bytes(state.digest(), "little")


PIPELINE_LIBRARIES = (
    "albucore",
    "albumentations",
    "kornia",
    "opencv-python",
    "opencv-python-headless",
    "timm",
)
"""Distributions that only a user's pipeline renders with."""


def library_versions(recipe: Recipe | None = None) -> dict[str, str]:
    """Versions of the libraries that can change a pixel: stored in a cache, compared on replay.

    Args:
        recipe: of the views. If it is a user's pipeline, `PIPELINE_LIBRARIES` count, too.

    Codec libraries that this Pillow was built without are left out. A build's suffix (`+cpu`,
    `+cu130`) is dropped, because no pixel depends on it.
    """
    versions = {
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "torch": str(torch.__version__),
        "torchvision": torchvision_version,
    }
    decoders = {
        "libjpeg": features.version_codec("jpg"),
        "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        "libwebp": features.version_module("webp"),
        "zlib": features.version_codec("zlib"),
    }
    if recipe is not None and recipe.callable is not None:
        decoders |= {name: _installed_version(name) for name in PIPELINE_LIBRARIES}
    versions |= {name: version for name, version in decoders.items() if version is not None}
    return {name: version.partition("+")[0] for name, version in sorted(versions.items())}


@functools.cache
def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


class WitnessDiff(NamedTuple):
    """How far a replayed view is from the recorded view of the same position."""

    max_levels: int
    """Largest absolute difference of a color value, 0 to 255."""
    changed_fraction: float
    """Fraction of the pixels that differ in any color."""


def compare_views(recorded_HW3: NDArray[np.uint8], replayed_HW3: NDArray[np.uint8]) -> WitnessDiff:
    """The difference of two views of one shape."""
    levels_HW = np.abs(recorded_HW3.astype(np.int16) - replayed_HW3).max(axis=-1)
    return WitnessDiff(int(levels_HW.max()), float((levels_HW > 0).mean()))


def accepts_drift(
    *, origins_equal: bool, witness_diffs: Sequence[WitnessDiff], max_drift: int
) -> bool:
    """Whether replayed views may be used in place of the recorded ones.

    Only if the decoded images and the draws are the same (so nothing but rendering changed), and
    every witness stays within `max_drift` levels. Without a witness there is no proof.
    """
    if not (origins_equal and witness_diffs):
        return False
    return all(diff.max_levels <= max_drift for diff in witness_diffs)


def explain_drift(
    recorded: Mapping[str, str], present: Mapping[str, str], witness_diffs: Sequence[WitnessDiff]
) -> str:
    """One sentence: how large the difference is, and which library changed, if one did.

    Args:
        recorded: `library_versions` at recording.
        present: `library_versions` of this process.
        witness_diffs: of the shard's witnesses.
    """
    changes = [
        f"{name} was {recorded.get(name, 'absent')} at recording and is "
        f"{present.get(name, 'absent')} here"
        for name in sorted(recorded.keys() | present.keys())
        if recorded.get(name) != present.get(name)
        # Earlier versions of this program did not record these.
        and (name in recorded or name not in PIPELINE_LIBRARIES)
    ]
    cause = ", ".join(changes) or "no library that renders views changed"
    return f"{_describe_diffs(witness_diffs)}; {cause}"


def _describe_diffs(witness_diffs: Sequence[WitnessDiff]) -> str:
    if not witness_diffs:
        return "there is no witness to compare with"
    levels = max(diff.max_levels for diff in witness_diffs)
    changed = max(diff.changed_fraction for diff in witness_diffs)
    if levels == 0:
        return "the witnesses are replayed exactly, so only some views changed"
    kind = "rounding" if levels <= ROUNDING_LEVELS else "another crop or other pixels, not rounding"
    extent = f"{100 * changed:.1f} %" if changed >= 0.0005 else "under 0.1 %"
    plural = "" if levels == 1 else "s"
    return f"{kind} (at most {levels} level{plural} in {extent} of pixels)"
