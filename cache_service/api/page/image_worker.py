"""The program that renders originals and views: `python -m cache_service.api.page.image_worker`.

It is the only part of the pages that imports Pillow and torch. It opens the datasets that a request
lists: those of the serve file, and safe ones that a cache names. It ends when its input ends.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cachetools import LRUCache

from cache_service.errors import DatasetError, KdCacheError, UnsupportedError
from cache_service.processes import ParentConnection

if TYPE_CHECKING:
    import PIL.Image

    from cache_service.datasets import ImageDataset
    from cache_service.views.replay import Views

MAX_SIDE = 512
"""Pixels of a picture's longer side; a larger one is reduced for the page."""

THUMBNAIL_SIDE = 128

NICE = 10
"""Rendering runs at a lower priority than the requests for rows."""

MAX_NAME_LENGTH = 200
"""Characters of a class's name that are sent to the page."""

MAX_DATASETS = 2
"""Datasets that stay open."""


class ImageWorker:
    """Renders images; keeps the datasets of the last requests open."""

    def __init__(self) -> None:
        self._datasets: LRUCache[str, ImageDataset] = LRUCache(MAX_DATASETS)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request of one of the three kinds, or an `error` in its place."""
        kinds = {"sample": self.render, "views": self.render_views, "labels": self.labels}
        try:
            return kinds[request["kind"]](request)
        except KdCacheError as refusal:
            return {"error": refusal.as_document()}
        except ImportError as missing:
            error = UnsupportedError(
                f"pictures need a library that is not installed: {missing}.",
                hint="Run `pip install 'kd-cache[train]'` on the server.",
            )
            return {"error": error.as_document()}

    def render(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One sample: its original, its view at a seed, and small views at other seeds.

        Args:
            request: `datasets` (configurations that may be opened), `dataset` (the identity that
                one of them must have), `recipe`, `sample`, `views` as [seed, position] pairs, the
                first of them the large one, and `names`, the classes to name.

        Raises:
            KdCacheError: no dataset fits, or it cannot be read.
            ImportError: the libraries that render are not installed.
        """
        from cache_service.format.recipe import Recipe
        from cache_service.views.replay import Views

        dataset = self._dataset(request)
        views = Views(Recipe.model_validate(request["recipe"]), dataset)
        sample = int(request["sample"])
        rendered = [
            _render_view(views, seed, position, side=THUMBNAIL_SIDE if number else MAX_SIDE)
            for number, (seed, position) in enumerate(request["views"])
        ]
        labels = {int(dataset.labels[sample]), *(view["partner_label"] for view in rendered)}
        original = dataset.image(sample)
        return {
            "original": _png_data_url(original, MAX_SIDE),
            "size": list(original.size),
            "label": int(dataset.labels[sample]),
            "names": _names(dataset.classes, labels | set(request["names"])),
            "views": rendered,
        }

    def render_views(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Small `views` at [seed, position] pairs, of any samples. Otherwise as `render`."""
        from cache_service.format.recipe import Recipe
        from cache_service.views.replay import Views

        views = Views(Recipe.model_validate(request["recipe"]), self._dataset(request))
        pairs = request["views"]
        return {"views": [_render_view(views, *pair, side=THUMBNAIL_SIDE) for pair in pairs]}

    def labels(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The labels of `samples`, and the names of all classes. Raises as `render`."""
        dataset = self._dataset(request)
        return {
            "labels": dataset.labels[request["samples"]].tolist() if request["samples"] else [],
            "classes": [name[:MAX_NAME_LENGTH] for name in dataset.classes],
        }

    def _dataset(self, request: Mapping[str, Any]) -> ImageDataset:
        digests, refusals = [], []
        for document in request["datasets"]:
            try:
                dataset = self._opened(document)
            except KdCacheError as refusal:  # another one may fit
                refusals.append(refusal)
                continue
            if dataset.id.model_dump(mode="json") == request["dataset"]:
                return dataset
            digests.append(dataset.id.sha256[:12])
        if not digests:
            raise refusals[0]
        raise DatasetError(
            "the cache was recorded from a dataset with the digest "
            f"{request['dataset']['sha256'][:12]}; the dataset that this server opens under its "
            f"name has the digest {', '.join(digests)}.",
            hint="List the recorded dataset under `datasets` in the serve file, with its root.",
        )

    def _opened(self, document: dict[str, Any]) -> ImageDataset:
        from cache_service.config import validate_config
        from cache_service.datasets import DatasetConfig, open_dataset

        key = json.dumps(document, sort_keys=True)
        if key not in self._datasets:
            config = validate_config(DatasetConfig, document, where="the dataset of this cache")
            self._datasets[key] = open_dataset(config)
        return self._datasets[key]


def _render_view(views: Views, seed: int, position: int, *, side: int) -> dict[str, Any]:
    import PIL.Image

    batch = views.render(seed, [position])
    dataset: Any = views.dataset
    partner = int(batch.partners_B[0])
    return {
        "seed": seed,
        "image": _png_data_url(PIL.Image.fromarray(batch.pixels_BHW3[0]), side),
        "digest": int(batch.digests_B[0]),
        "origin": int(batch.origins_B[0]),
        "sample": int(batch.samples_B[0]),
        "partner": partner,
        "partner_label": int(dataset.labels[partner]),
        "weight": float(batch.weights_B[0]),
    }


def _png_data_url(picture: PIL.Image.Image, side: int) -> str:
    """A picture as the address of a PNG image whose sides are at most `side` pixels."""
    smaller = picture.copy()
    smaller.thumbnail((side, side))  # does not enlarge small pictures
    file = io.BytesIO()
    smaller.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _names(classes: tuple[str, ...], labels: set[int]) -> dict[str, str]:
    known = (label for label in labels if label < len(classes))
    return {str(label): classes[label][:MAX_NAME_LENGTH] for label in known}


def main() -> None:
    """Answer requests until the parent closes its end."""
    os.nice(NICE)
    parent, worker = ParentConnection(), ImageWorker()
    for request in parent.messages():
        parent.send(worker.answer(request))


if __name__ == "__main__":
    main()
