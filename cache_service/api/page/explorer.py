"""One sample under one seed, as the page of the explorer shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cache_service.api.page.answer import Answer, describe_answer, verdict
from cache_service.api.page.png import data_url, encode_png
from cache_service.api.page.renderer import DrawingError, Renderer, Scene
from cache_service.api.page.rows import (
    Commits,
    Row,
    find_others,
    find_row,
    kept_view,
    kept_views,
)
from cache_service.api.page.scene import Drawn, fitting_datasets, judge, scene_request
from cache_service.rows.reader import Cache

WAIT_S = 8.0
"""What a page waits for its pictures; without them it is sent as it is and loads itself again."""


class Note(NamedTuple):
    """Why something is not shown, and what to do about it."""

    text: str
    hint: str = ""
    again: bool = False
    """Whether the pictures are on their way."""


class Other(NamedTuple):
    """The same sample under another seed."""

    row: Row
    answer: Answer
    picture: str


class Kept(NamedTuple):
    """A view that the cache keeps whole."""

    sample: int
    picture: str


class Explored(NamedTuple):
    """Everything that the page shows.

    Attributes:
        label: of the sample, of a mixed view of its larger part; None without the dataset.
        original: address of the picture; empty without the dataset.
        view: address of the view's pixels; empty where they are not known.
        kept: whether `view` comes from the cache itself.
        drawn: the replay; None without the dataset.
        names: of classes, by class, as far as the dataset has any.
        kept_views: of the same shard, where the view itself cannot be shown.
        note: what is missing.
    """

    row: Row
    answer: Answer
    label: int | None
    original: str
    original_size: tuple[int, int] | None
    view: str
    kept: bool
    drawn: Drawn | None
    names: Mapping[int, str]
    others: tuple[Other, ...]
    kept_views: tuple[Kept, ...]
    note: Note | None

    def name(self, label: int) -> str:
        """A class as people call it."""
        return self.names.get(label, f"class {label}")

    def short_name(self, label: int) -> str:
        """The same for narrow places."""
        return self.names.get(label, str(label))


def explore(
    cache: Cache,
    seed: int,
    sample: int,
    *,
    commits: Commits,
    datasets: Sequence[Mapping[str, Any]],
    renderer: Renderer,
    wait_s: float,
) -> Explored:
    """Read the rows of a sample, and draw what the server may draw.

    Raises:
        RowsNotBuiltError: the row is not recorded.
        CorruptError: stored bytes are not those committed.
    """
    row = find_row(cache, commits, seed, sample)
    others = find_others(cache, commits, seed, sample)
    scene, note = _draw(cache, [row, *others], datasets, renderer, wait_s)
    drawn = _judged(scene, [row, *others])
    label = drawn[0].label if drawn else None
    spec, first = cache.spec, drawn[0] if drawn else None
    view = first.picture if first else ""
    own = kept_view(cache, row)
    if first and first.drift:
        note = Note(
            f"This view does not replay here: {first.drift}.",
            "The answers are shown without pixels. `kd-cache verify` checks what is stored.",
        )
    if not view and own is not None:
        view = data_url(encode_png(own))
    pictures = [each.picture for each in drawn[1:]] or [""] * len(others)
    labels: list[int | None] = [each.label for each in drawn[1:]] or [label] * len(others)
    return Explored(
        row=row,
        answer=describe_answer(spec, row.logits_RC, label),
        label=label,
        original=f"data:image/png;base64,{scene['original']}" if scene else "",
        original_size=(scene["size"][0], scene["size"][1]) if scene else None,
        view=view,
        kept=own is not None and not (first and first.picture),
        drawn=first,
        names={int(key): name for key, name in scene["names"].items()} if scene else {},
        others=tuple(
            Other(each, describe_answer(spec, each.logits_RC, its), picture)
            for each, its, picture in zip(others, labels, pictures, strict=True)
        ),
        kept_views=() if view else _kept(cache, row),
        note=note,
    )


def _draw(
    cache: Cache,
    rows: Sequence[Row],
    datasets: Sequence[Mapping[str, Any]],
    renderer: Renderer,
    wait_s: float,
) -> tuple[Scene | None, Note | None]:
    spec = cache.spec
    if spec.recipe.callable is not None:
        return None, Note(
            f"The views of this cache are made by code of its own ({spec.recipe.callable}), which "
            "the server does not run."
        )
    fitting = fitting_datasets(cache.group, datasets)
    if not fitting:
        return None, Note(
            f"The server may not open the dataset {spec.dataset.name} ({spec.dataset.split}), so "
            "the original, the view and the label are not shown.",
            "List it under `builds.datasets` in the server's configuration.",
        )
    tops = {int(top) for row in rows for top in row.logits_RC.argmax(axis=1)}
    best = {likely.label for likely in describe_answer(spec, rows[0].logits_RC, None).likeliest}
    request = scene_request(
        spec,
        fitting,
        sample=rows[0].sample,
        views=[(row.seed, row.position) for row in rows],
        names=sorted(tops | best | {verdict(rows[0].logits_RC)}),
    )
    try:
        scene = renderer.scene(request, wait_s=wait_s)
    except DrawingError as refusal:
        return None, Note(_redacted(refusal.message, fitting), refusal.hint)
    if scene is None:
        return None, Note("The pictures are being drawn; the page loads again by itself.", "", True)
    return scene, None


def _redacted(text: str, datasets: Sequence[Mapping[str, Any]]) -> str:
    """Without the places of datasets: they are the operator's."""
    for dataset in datasets:
        if dataset["root"]:
            text = text.replace(str(dataset["root"]), "...")
    return text


def _judged(scene: Scene | None, rows: Sequence[Row]) -> list[Drawn]:
    if scene is None:
        return []
    return [
        judge(drawn, label=scene["label"], digest=row.digest, origin=row.origin)
        for drawn, row in zip(scene["views"], rows, strict=True)
    ]


def _kept(cache: Cache, row: Row) -> tuple[Kept, ...]:
    return tuple(
        Kept(sample, data_url(encode_png(view))) for sample, view in kept_views(cache, row)
    )
