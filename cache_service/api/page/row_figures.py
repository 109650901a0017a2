"""The recorded row of a sample under a seed, and the figures that its page shows of it.

Shape letters: R cells, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError, RowsNotBuiltError
from cache_service.format.cells import expand_cells
from cache_service.format.codecs import Arrays, Head
from cache_service.format.seeds import describe_seeds
from cache_service.format.shard import REPAIR
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import Cache
from cache_service.views.order import epoch_order

NUM_LIKELIEST = 5
"""Classes in the table of the whole view."""

NUM_OTHER_SEEDS = 6
"""Other seeds under which the same sample is shown."""

Commits = Mapping[int, Sequence[int]]
"""Recorded shards by seed, both ascending."""

Floats = NDArray[np.float32]


class Row(NamedTuple):
    """The recorded row of one view.

    Attributes:
        logits_RC: of all cells, float32.
        digest, origin: of the view; see `cache_service.views.replay`.
    """

    seed: int
    sample: int
    position: int
    shard: int
    logits_RC: Floats
    digest: int
    origin: int


def find_row(cache: Cache, commits: Commits, seed: int, sample: int) -> Row:
    """Read the row of a sample under a seed.

    Raises:
        RowsNotBuiltError: it is not recorded, or there is no such sample.
        CorruptError: what is stored there is not what was committed.
    """
    spec = cache.spec
    if not 0 <= sample < spec.dataset.num_samples:
        raise RowsNotBuiltError(
            f"there is no sample {sample}: {spec.dataset.name} has samples 0 to "
            f"{spec.dataset.num_samples - 1}."
        )
    position = position_of(spec, seed, sample)
    shard = position // spec.layout.shard_rows
    if shard not in commits.get(seed, ()):
        complete = [s for s, shards in commits.items() if len(shards) == spec.num_shards]
        raise RowsNotBuiltError(
            f"sample {sample} of seed {seed} is not recorded yet: it belongs at position "
            f"{position:,}, in shard {shard}. Complete seeds: {describe_seeds(complete)}.",
            hint="Run the same `kd-cache build` again to finish it.",
        )
    arrays = cache.gather(seed, np.array([position], np.int64))
    if int(arrays["sample"][0]) != sample:
        raise CorruptError(
            f"position {position} of seed {seed} holds sample {arrays['sample'][0]}, not {sample}.",
            hint=REPAIR,
        )
    return Row(
        seed,
        sample,
        position,
        shard,
        cell_logits(spec, arrays, cache.head()),
        int(arrays["digest"][0]),
        int(arrays["origin"][0]),
    )


def find_other_rows(
    cache: Cache, commits: Commits, seed: int, sample: int
) -> tuple[list[Row], CorruptError | None]:
    """Rows of the same sample under the nearest other seeds that have it, by ascending seed.

    A damaged row is left out, and the damage is returned.
    """
    nearest = sorted((s for s in commits if s != seed), key=lambda s: (abs(s - seed), s))
    chosen = []
    for other in nearest[: 3 * NUM_OTHER_SEEDS]:  # an order of 1.28 M samples costs 0.1 s
        visited = np.flatnonzero(order_of(cache.spec, other) == sample)
        if len(visited) and visited[0] // cache.spec.layout.shard_rows in commits[other]:
            chosen.append(other)
        if len(chosen) == NUM_OTHER_SEEDS:
            break
    rows, damage = [], None
    for other in sorted(chosen):
        try:
            rows.append(find_row(cache, commits, other, sample))
        except CorruptError as found:
            damage = found
    return rows, damage


def position_of(spec: CacheSpec, seed: int, sample: int) -> int:
    """The first position of a sample in a seed's order.

    Raises:
        RowsNotBuiltError: the seed does not visit the sample, because the recipe has repeats.
    """
    found = np.flatnonzero(order_of(spec, seed) == sample)
    repeats = spec.recipe.repeats
    if not len(found):
        raise RowsNotBuiltError(
            f"seed {seed} does not visit sample {sample}: with augment.repeats={repeats} each seed "
            f"visits one sample in {repeats}.",
            hint=f"It is visited by one of the next {repeats - 1} seeds.",
        )
    return int(found[0])


def order_of(spec: CacheSpec, seed: int) -> NDArray[np.int32]:
    """Sample at each position of a seed."""
    return epoch_order(spec.dataset.num_samples, seed, spec.recipe.repeats)


def first_recorded(spec: CacheSpec, commits: Commits) -> tuple[int, int] | None:
    """(seed, sample) to begin with: sample 0 if it is recorded; None in an empty cache."""
    if not commits:
        return None
    seed, shards = next(iter(commits.items()))
    order_N = order_of(spec, seed)
    first = np.flatnonzero(order_N == 0)
    if len(first) and int(first[0]) // spec.layout.shard_rows in shards:
        return seed, 0
    start, _ = spec.shard_range(shards[0])
    return seed, int(order_N[start])


def neighbor_seeds(commits: Commits, seed: int) -> tuple[int | None, int | None]:
    """The recorded seeds before and after a seed."""
    before = [s for s in commits if s < seed]
    after = [s for s in commits if s > seed]
    return max(before, default=None), min(after, default=None)


class ClassFigures(NamedTuple):
    """A class with its logit and its probability, over the whole view."""

    label: int
    logit: float
    probability: float


class CellFigures(NamedTuple):
    """What the teacher predicts from one cell.

    Attributes:
        row, column: of the cell in its grid, from 0.
        top: the likeliest class.
        top_probability: its probability.
        target_probability: probability of the target class.
        target_logit: its logit.
        complementary: whether exactly one of the predictions from the cell and from the whole view
            is the label; None if no label is known.
    """

    row: int
    column: int
    top: int
    top_probability: float
    target_probability: float
    target_logit: float
    complementary: bool | None


class RowFigures(NamedTuple):
    """The figures of one row.

    Attributes:
        target: the class that the maps show: the label, or the prediction if no label is known.
        likeliest: over the whole view, best first.
        target_rank: of the target over the whole view, from 1.
        whole: the target over the whole view.
        grids: the m x m cells of each scale m, row by row.
        legend: the predicted classes with the number of cells that predict each, most cells first.
            A class's mark on the maps is its place in this list, from 1.
        target_range: lowest and highest probability of the target over all cells.
    """

    target: int
    likeliest: list[ClassFigures]
    target_rank: int
    whole: ClassFigures
    grids: dict[int, list[CellFigures]]
    legend: list[tuple[int, int]]
    target_range: tuple[float, float]


def cell_logits(spec: CacheSpec, arrays: Arrays, head: Head | None) -> Floats:
    """Logits of all cells of the first row, float32 [R, C]."""
    stored_BSC = spec.decode(arrays, head=head)
    cells_RC: Floats = expand_cells(stored_BSC, spec.scales, spec.stored_scales)[0]
    return cells_RC


def row_figures(spec: CacheSpec, logits_RC: Floats, label: int | None) -> RowFigures:
    """Compute the figures of one row.

    A cell is complementary if (its prediction is the label) != (the whole view's is).

    Args:
        spec: of the cache.
        logits_RC: from `cell_logits`.
        label: the sample's class, of a mixed view that of its larger part; None if not known.
    """
    probabilities_RC = _softmax(logits_RC)
    tops_R = logits_RC.argmax(axis=1)
    target = int(tops_R[0]) if label is None else label
    ranked = np.argsort(-logits_RC[0], kind="stable")
    right_R = tops_R == target
    grids: dict[int, list[CellFigures]] = {}
    first = 0
    for scale in spec.scales:
        grids[scale] = [
            CellFigures(
                row=number // scale,
                column=number % scale,
                top=int(tops_R[first + number]),
                top_probability=float(probabilities_RC[first + number, tops_R[first + number]]),
                target_probability=float(probabilities_RC[first + number, target]),
                target_logit=float(logits_RC[first + number, target]),
                complementary=None if label is None else bool(right_R[first + number] ^ right_R[0]),
            )
            for number in range(scale * scale)
        ]
        first += scale * scale

    def whole(label: int) -> ClassFigures:
        return ClassFigures(label, float(logits_RC[0, label]), float(probabilities_RC[0, label]))

    return RowFigures(
        target=target,
        likeliest=[whole(int(label)) for label in ranked[:NUM_LIKELIEST]],
        target_rank=int(np.flatnonzero(ranked == target)[0]) + 1,
        whole=whole(target),
        grids=grids,
        legend=Counter(tops_R.tolist()).most_common(),
        target_range=(
            float(probabilities_RC[:, target].min()),
            float(probabilities_RC[:, target].max()),
        ),
    )


def _softmax(logits_RC: Floats) -> NDArray[np.float64]:
    exact_RC = logits_RC.astype(np.float64)
    powers_RC: NDArray[np.float64] = np.exp(exact_RC - exact_RC.max(axis=1, keepdims=True))
    powers_RC /= powers_RC.sum(axis=1, keepdims=True)
    return powers_RC
