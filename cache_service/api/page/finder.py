"""Ways to samples worth a look: what a search of recorded rows found, with names and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cache_service.api.page.explorer import ImageAccess, Note, rendered
from cache_service.api.page.formatting import fine_percent
from cache_service.api.page.replays import checked_replay
from cache_service.api.page.row_figures import Commits, order_of
from cache_service.api.page.search import (
    Ints,
    Scan,
    differing,
    least_certain,
    most_classes,
    predicted_as,
)
from cache_service.errors import ConfigError
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import Cache

WAYS = {
    "uncertain": "Least certain",
    "disagree": "Cells disagree most",
    "differ": "Teacher and label differ",
    "class": "A class",
}
"""What can be looked for, besides a random sample."""


class FoundSample(NamedTuple):
    """One sample of a page of results.

    Attributes:
        prediction: name of the predicted class.
        probability: of that class.
        words: why the sample was found.
        label: name of the sample's class; empty if it is not known.
        image: address of its view; empty if that cannot be shown.
    """

    sample: int
    prediction: str
    probability: float
    words: str
    label: str
    image: str


class Found(NamedTuple):
    """What a search found.

    Attributes:
        wanted: name of the class that was looked for; empty for the other ways.
        note: what is missing.
        is_possible: whether the search could be made at all; if not, the note says why.
    """

    scan: Scan
    samples: list[FoundSample]
    wanted: str
    note: Note | None
    is_possible: bool


def find(
    cache: Cache, scan: Scan, seed: int, *, by: str, wanted: str, access: ImageAccess
) -> Found:
    """Rank the rows of a scan.

    Args:
        cache: of the rows.
        scan: what was read of it.
        seed: of the scan.
        by: one of `WAYS`.
        wanted: for the way `class`, a class by its number or a part of its name, as it was typed.
        access: to labels and images.

    Raises:
        ConfigError: there is no such class.
    """
    spec = cache.spec
    if by == "disagree" and spec.num_cells == 1:
        none = Note("This cache holds no cells besides the whole view, so none can disagree.")
        return Found(scan, [], "", none, is_possible=False)
    partners_N = _partners(spec, seed, scan)
    samples = sorted({*scan.samples_N.tolist(), *partners_N.tolist()})
    document, note = rendered(cache, access, "labels", {"samples": samples})
    names: Sequence[str] = () if document is None else document["classes"]
    labels = {} if document is None else dict(zip(samples, document["labels"], strict=True))
    if by == "differ" and document is None:
        return Found(scan, [], "", note, is_possible=False)
    if by == "class" and document is None and not wanted.isdecimal():
        return Found(scan, [], "", note, is_possible=False)
    label = find_class(wanted, names, spec.teacher.num_classes) if by == "class" else 0
    if by == "differ":
        labels_N2 = [
            [labels[int(sample)], labels[int(partner)]]
            for sample, partner in zip(scan.samples_N, partners_N, strict=True)
        ]
        rows = differing(scan, np.array(labels_N2, np.int64).reshape(-1, 2))
    elif by == "class":
        rows = predicted_as(scan, label)
    else:
        rows = least_certain(scan) if by == "uncertain" else most_classes(scan)
    images, image_note = _images(cache, seed, scan, rows, access)
    found = [
        FoundSample(
            sample=(sample := int(scan.samples_N[row])),
            prediction=_name(names, int(scan.tops_N[row])),
            probability=float(scan.probabilities_N[row]),
            words=_words(spec, scan, int(row), by),
            label=_name(names, labels[sample]) if sample in labels else "",
            image=image,
        )
        for row, image in zip(rows.tolist(), images, strict=True)
    ]
    wanted = _name(names, label) if by == "class" else ""
    return Found(scan, found, wanted, note or image_note, is_possible=True)


def find_class(wanted: str, names: Sequence[str], num_classes: int) -> int:
    """The class that somebody typed: a number, a name, or a part of a name.

    Raises:
        ConfigError: there is no such class.
    """
    if wanted.isascii() and wanted.isdecimal():
        if int(wanted[:12]) < num_classes:
            return int(wanted)
    elif wanted:
        lower = [name.lower() for name in names]
        if wanted.lower() in lower:
            return lower.index(wanted.lower())
        parts = [number for number, name in enumerate(lower) if wanted.lower() in name]
        if parts:
            return parts[0]
    raise ConfigError(
        f"{wanted[:80]!r} is no class of this cache.",
        hint=f"Write a number from 0 to {num_classes - 1}, or a part of a class's name.",
    )


def random_row(cache: Cache, commits: Commits, seed: int | None) -> tuple[int, int]:
    """(seed, sample) of a random recorded row, under a seed or under any."""
    draw = np.random.default_rng()
    shards = [
        (each, shard)
        for each, recorded in commits.items()
        if seed in (None, each)
        for shard in recorded
    ]
    chosen, shard = shards[int(draw.integers(len(shards)))]
    start, stop = cache.spec.shard_range(shard)
    position = int(draw.integers(start, stop))
    return chosen, int(order_of(cache.spec, chosen)[position])


def _partners(spec: CacheSpec, seed: int, scan: Scan) -> Ints:
    """The sample that each row's view may be mixed with; its own one if views are not mixed."""
    if not spec.recipe.mixing:
        return scan.samples_N
    order_N = order_of(spec, seed)
    partners_N: Ints = order_N[np.minimum(scan.positions_N ^ 1, len(order_N) - 1)].astype(np.int64)
    return partners_N


def _words(spec: CacheSpec, scan: Scan, row: int, by: str) -> str:
    if by == "disagree":
        cells = spec.scales[-1] ** 2
        return f"{int(scan.num_classes_N[row])} classes in {cells} cells"
    return fine_percent(float(scan.probabilities_N[row]))


def _images(
    cache: Cache, seed: int, scan: Scan, rows: Ints, access: ImageAccess
) -> tuple[list[str], Note | None]:
    """Addresses of the views of rows, empty where they cannot be shown."""
    positions = scan.positions_N[rows]
    none = [""] * len(rows)
    if not len(rows):
        return none, None
    document, note = rendered(
        cache, access, "views", {"views": [[seed, int(position)] for position in positions]}
    )
    if document is None:
        return none, note
    recorded = cache.gather(seed, positions, arrays=("digest", "origin"))
    views: Sequence[Mapping[str, Any]] = document["views"]
    return [
        checked_replay(view, label=0, digest=int(digest), origin=int(origin)).image
        for view, digest, origin in zip(views, recorded["digest"], recorded["origin"], strict=True)
    ], None


def _name(names: Sequence[str], label: int) -> str:
    return names[label] if label < len(names) else f"class {label}"
