"""The explorer: one sample under one seed, with everything that its page shows.

The recorded rows come from the cache. The original and the views come from the dataset, if the
server's configuration lists it, and are shown only if they are what the teacher saw.

Shape letters: R cells, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.api.page.drawing import png_data_url
from cache_service.api.page.images import ImageError, ImageRenderer, Images
from cache_service.errors import CorruptError, RowsNotBuiltError
from cache_service.format.cells import expand_cells
from cache_service.format.codecs import Arrays, Head
from cache_service.format.group import Group
from cache_service.format.seeds import describe_seeds
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import Cache
from cache_service.views.draws import epoch_order

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
            f"position {position} of seed {seed} holds sample {arrays['sample'][0]}, not {sample}."
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
        shard = position_of(cache.spec, other, sample) // cache.spec.layout.shard_rows
        if shard in commits[other]:
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
    """Position of a sample in a seed's order."""
    return int(np.flatnonzero(epoch_order(spec.dataset.num_samples, seed) == sample)[0])


def first_recorded(spec: CacheSpec, commits: Commits) -> tuple[int, int] | None:
    """(seed, sample) to begin with: sample 0 if it is recorded; None in an empty cache."""
    if not commits:
        return None
    seed, shards = next(iter(commits.items()))
    if position_of(spec, seed, 0) // spec.layout.shard_rows in shards:
        return seed, 0
    start, _ = spec.shard_range(shards[0])
    return seed, int(epoch_order(spec.dataset.num_samples, seed)[start])


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
    """

    target: int
    likeliest: list[ClassFigures]
    target_rank: int
    whole: ClassFigures
    grids: dict[int, list[CellFigures]]


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
    )


def _softmax(logits_RC: Floats) -> NDArray[np.float64]:
    exact_RC = logits_RC.astype(np.float64)
    powers_RC: NDArray[np.float64] = np.exp(exact_RC - exact_RC.max(axis=1, keepdims=True))
    powers_RC /= powers_RC.sum(axis=1, keepdims=True)
    return powers_RC


class Replay(NamedTuple):
    """A view as the image worker rendered it again.

    Attributes:
        image: address of the image; empty if its digest says that it is another view.
        drift: why it is not shown; empty if it is.
        label: the sample's class, of a mixed view that of its larger part.
        partner: the sample mixed in; None if the view is not mixed.
        weight: weight of the sample's own label.
    """

    image: str
    drift: str
    label: int
    partner: int | None
    partner_label: int
    weight: float


def matching_datasets(
    group: Group, configured: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The configured datasets that a cache may have been recorded from, the likeliest first.

    What a cache says about its dataset only chooses among them. It is never opened itself, because
    it could name any folder or any module of this machine.
    """
    recorded = _with_defaults(group.provenance.get("dataset"))
    spec = group.spec.dataset
    # A factory may have another name in the spec than in a configuration file.
    names = ((spec.name, spec.split), (recorded.get("name"), recorded["split"]))
    datasets = [_with_defaults(section) for section in configured]
    matching = [each for each in datasets if (each.get("name"), each["split"]) in names]
    return sorted(matching, key=lambda each: each != recorded)


def _with_defaults(section: Any) -> dict[str, Any]:
    """A `dataset:` section such that equal ones compare equal, however they were written."""
    defaults: dict[str, Any] = {"root": None, "split": "train", "args": {}}
    return defaults | (dict(section) if isinstance(section, Mapping) else {})


def image_request(
    spec: CacheSpec,
    datasets: Sequence[Mapping[str, Any]],
    *,
    sample: int,
    views: Sequence[tuple[int, int]],
    names: Sequence[int],
) -> dict[str, Any]:
    """The request for a sample and its views at (seed, position) pairs; see `image_worker`."""
    return {
        "datasets": list(datasets),
        "dataset": spec.dataset.model_dump(mode="json"),
        "recipe": spec.recipe.model_dump(mode="json"),
        "sample": sample,
        "views": [list(pair) for pair in views],
        "names": sorted(set(names)),
    }


def checked_replay(view: Mapping[str, Any], *, label: int, digest: int, origin: int) -> Replay:
    """Compare a rendered view with what was recorded.

    A view is shown only if its pixels have the recorded digest. Any other pixels under the
    teacher's predictions would be a picture that the teacher never saw.

    Args:
        view: one entry of the `views` of an image worker's answer.
        label: of the sample.
        digest, origin: recorded ones of the view's row.
    """
    same = view["digest"] == digest
    drift = (
        "its images and draws are those recorded, but the installed libraries render other pixels"
        if view["origin"] == origin
        else "its image or its draws are not those recorded"
    )
    return Replay(
        image=view["image"] if same else "",
        drift="" if same else drift,
        label=label if view["weight"] >= 0.5 else view["partner_label"],
        partner=view["partner"] if view["partner"] != view["sample"] else None,
        partner_label=view["partner_label"],
        weight=view["weight"],
    )


class Note(NamedTuple):
    """Why something is not shown, and what to do about it.

    Attributes:
        is_pending: whether it will be shown when the page is loaded again.
    """

    text: str
    hint: str = ""
    is_pending: bool = False


class OtherSeed(NamedTuple):
    """The same sample under another seed."""

    row: Row
    figures: RowFigures
    image: str


class Explored(NamedTuple):
    """Everything that the page shows of one sample under one seed.

    Attributes:
        images: of the sample; None if the server cannot render them.
        replay: of the view; None without images.
        view: address of the view's image; empty if its pixels are not known.
        is_stored: whether `view` comes from the cache itself.
        stored_views: images of the shard's witnesses by sample, if the view cannot be shown.
        note: what is missing.
        damage: found in other seeds of the sample or in stored views, which are left out.
    """

    row: Row
    figures: RowFigures
    images: Images | None
    replay: Replay | None
    view: str
    is_stored: bool
    others: list[OtherSeed]
    stored_views: dict[int, str]
    note: Note | None
    damage: CorruptError | None

    @property
    def label(self) -> int | None:
        """Label of the sample, of a mixed view that of its larger part; None if not known."""
        return self.replay.label if self.replay else None

    def name(self, label: int) -> str:
        """The name of a class in a sentence."""
        return self._names.get(str(label), f"class {label}")

    def short_name(self, label: int) -> str:
        """The name of a class in a narrow place."""
        return self._names.get(str(label), str(label))

    @property
    def _names(self) -> dict[str, str]:
        return self.images["names"] if self.images else {}


def explore(
    cache: Cache,
    seed: int,
    sample: int,
    *,
    commits: Commits,
    datasets: Sequence[Mapping[str, Any]],
    renderer: ImageRenderer,
    wait_s: float,
) -> Explored:
    """Read the rows of a sample, and render those images that the server may render.

    Args:
        cache: of the sample.
        seed, sample: which view.
        commits: recorded shards of the cache.
        datasets: `dataset:` sections that the server's own configuration allows to be opened.
        renderer: renders images.
        wait_s: time for the images; without them the page is sent, and loads itself again.

    Raises:
        RowsNotBuiltError: the row is not recorded.
        CorruptError: stored bytes are not those committed.
    """
    row = find_row(cache, commits, seed, sample)
    others, damage = find_other_rows(cache, commits, seed, sample)
    rows = [row, *others]
    images, note = _images(cache, rows, datasets, renderer, wait_s)
    replays: list[Replay | None] = [None] * len(rows)
    if images is not None:
        replays = [
            checked_replay(view, label=images["label"], digest=each.digest, origin=each.origin)
            for view, each in zip(images["views"], rows, strict=True)
        ]
    figures = [
        row_figures(cache.spec, each.logits_RC, replay.label if replay else None)
        for each, replay in zip(rows, replays, strict=True)
    ]
    addresses = [replay.image if replay else "" for replay in replays]
    if replays[0] and replays[0].drift:
        note = Note(
            f"This view cannot be replayed here: {replays[0].drift}.",
            "The predictions are shown without pixels. `kd-cache verify` checks what is stored.",
        )
    stored: dict[int, str] = {}
    if not addresses[0]:
        stored, found = _intact_views(cache, row)
        damage = found or damage
    return Explored(
        row=row,
        figures=figures[0],
        images=images,
        replay=replays[0],
        view=addresses[0] or stored.get(sample, ""),
        is_stored=sample in stored,
        others=list(map(OtherSeed, rows[1:], figures[1:], addresses[1:])),
        stored_views={} if sample in stored else stored,
        note=note,
        damage=damage,
    )


def stored_views(cache: Cache, row: Row) -> dict[int, str]:
    """Addresses of the images of a shard's witnesses, by sample."""
    positions = cache.layout.witness_positions(row.shard)
    order = epoch_order(cache.spec.dataset.num_samples, row.seed)
    views = cache.witnesses(row.seed, row.shard)
    return {
        int(order[position]): png_data_url(view)
        for position, view in zip(positions, views, strict=True)
    }


def _intact_views(cache: Cache, row: Row) -> tuple[dict[int, str], CorruptError | None]:
    try:
        return stored_views(cache, row), None
    except CorruptError as damage:
        return {}, damage


def _images(
    cache: Cache,
    rows: Sequence[Row],
    datasets: Sequence[Mapping[str, Any]],
    renderer: ImageRenderer,
    wait_s: float,
) -> tuple[Images | None, Note | None]:
    spec = cache.spec
    if spec.recipe.callable is not None:
        return None, Note(
            f"The views of this cache are made by code of its own ({spec.recipe.callable}), which "
            "the server does not run."
        )
    matching = matching_datasets(cache.group, datasets)
    if not matching:
        return None, Note(
            f"The server may not open the dataset {spec.dataset.name} ({spec.dataset.split}), so "
            "the original, the view and the label are not shown.",
            "List it under `builds.datasets` in the server's configuration.",
        )
    predicted = {int(top) for row in rows for top in row.logits_RC.argmax(axis=1)}
    likeliest = {each.label for each in row_figures(spec, rows[0].logits_RC, None).likeliest}
    request = image_request(
        spec,
        matching,
        sample=rows[0].sample,
        views=[(row.seed, row.position) for row in rows],
        names=sorted(predicted | likeliest),
    )
    try:
        images = renderer.render(request, wait_s=wait_s)
    except ImageError as refusal:
        return None, Note(_redact(refusal.message, matching), refusal.hint)
    if images is None:
        text = "The images are being rendered. This page loads itself again."
        return None, Note(text, is_pending=True)
    return images, None


def _redact(text: str, datasets: Sequence[Mapping[str, Any]]) -> str:
    """Remove the roots of datasets: only the operator may know them."""
    for dataset in datasets:
        if dataset["root"]:
            text = text.replace(str(dataset["root"]), "...")
    return text
