"""The explorer: one sample under one seed, with everything that its page shows.

The recorded rows come from the cache. The original and the views come from the dataset, if the
server may open it, and are shown only if they are what the teacher saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cache_service.api.page.drawing import png_data_url
from cache_service.api.page.images import ImageError, ImageRenderer, Images
from cache_service.api.page.replays import (
    Replay,
    checked_replay,
    image_request,
    openable_datasets,
    redact,
)
from cache_service.api.page.row_figures import (
    Commits,
    Row,
    RowFigures,
    find_other_rows,
    find_row,
    row_figures,
)
from cache_service.errors import CorruptError
from cache_service.rows.reader import Cache
from cache_service.views.order import epoch_order


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

    @property
    def _names(self) -> dict[str, str]:
        return self.images["names"] if self.images else {}


class ImageAccess(NamedTuple):
    """How the pages of a server get images.

    Attributes:
        datasets: sections `dataset` of the serve file, which may be opened.
        is_private: whether only this machine reaches the server; see `openable_datasets`.
        renderer: renders images.
        wait_s: time for the images; without them the page is sent, and loads itself again.
    """

    datasets: Sequence[Mapping[str, Any]]
    is_private: bool
    renderer: ImageRenderer
    wait_s: float


def explore(
    cache: Cache, seed: int, sample: int, *, commits: Commits, access: ImageAccess
) -> Explored:
    """Read the rows of a sample, and render those images that the server may render.

    Args:
        cache: of the sample.
        seed, sample: which view.
        commits: recorded shards of the cache.
        access: to images.

    Raises:
        RowsNotBuiltError: the row is not recorded.
        CorruptError: stored bytes are not those committed.
    """
    row = find_row(cache, commits, seed, sample)
    others, damage = find_other_rows(cache, commits, seed, sample)
    rows = [row, *others]
    images, note = _images(cache, rows, access)
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
    spec = cache.spec
    order = epoch_order(spec.dataset.num_samples, row.seed, spec.recipe.repeats)
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
    cache: Cache, rows: Sequence[Row], access: ImageAccess
) -> tuple[Images | None, Note | None]:
    predicted = {int(top) for row in rows for top in row.logits_RC.argmax(axis=1)}
    likeliest = {each.label for each in row_figures(cache.spec, rows[0].logits_RC, None).likeliest}
    question = {
        "sample": rows[0].sample,
        "views": [[row.seed, row.position] for row in rows],
        "names": sorted(predicted | likeliest),
    }
    return rendered(cache, access, "sample", question)


def rendered(
    cache: Cache, access: ImageAccess, kind: str, question: Mapping[str, Any]
) -> tuple[Images | None, Note | None]:
    """What the image process answers about the dataset of a cache, or why it does not.

    Args:
        cache: whose dataset and recipe are used.
        access: to the process and to datasets.
        kind: of the question; see `image_worker`.
        question: its fields.
    """
    spec = cache.spec
    openable = openable_datasets(cache.group, access.datasets, is_private=access.is_private)
    if spec.recipe.callable is not None:
        return None, Note(
            f"The views of this cache are made by code of its own ({spec.recipe.callable}), which "
            "the server does not run."
        )
    if not openable.datasets:
        return None, Note(
            f"The server does not open the dataset {spec.dataset.name} ({spec.dataset.split}), so "
            f"images and labels are not shown: {openable.reason}.",
            "List it under `datasets` in the serve file, as in the build file.",
        )
    request = image_request(spec, openable.datasets, kind, question)
    try:
        images = access.renderer.render(request, wait_s=access.wait_s)
    except ImageError as refusal:
        return None, Note(redact(refusal.message, openable.datasets), refusal.hint)
    if images is None:
        text = "The images are being rendered. This page loads itself again."
        return None, Note(text, is_pending=True)
    return images, None
