"""The process that draws originals and views: requests in, pictures out, one JSON line each.

The only part of the page that imports Pillow and torch. It opens the datasets that a request
lists, and the server puts only those of its own configuration there. It ends with its input.
"""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sys
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from cache_service.errors import DatasetError, KdCacheError

if TYPE_CHECKING:
    import PIL.Image

    from cache_service.datasets import ImageDataset
    from cache_service.views.replay import Views

MAX_SIDE = 512
"""Pixels of a picture's longer side; a larger one is reduced for the page."""

THUMBNAIL_SIDE = 128

NICE = 10
"""Rows are answered before pictures are drawn."""

MAX_NAME = 200
"""Characters kept of a class's name."""

MAX_OPEN = 2
"""Datasets kept open."""


class Painter:
    """Draws scenes; keeps the last datasets open between them."""

    def __init__(self) -> None:
        self._opened: dict[str, ImageDataset] = {}

    def scene(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """One sample: its original, its view at a seed, and small views at other seeds.

        Args:
            request: `datasets` (configurations that may be opened), `dataset` (the identity that
                one of them must have), `recipe`, `sample`, `views` as [seed, position] pairs, the
                first one the large one, and `names`, the classes to name.

        Raises:
            KdCacheError: no dataset fits, or it cannot be read.
            ImportError: the libraries that render are not installed.
        """
        from cache_service.format.recipe import Recipe
        from cache_service.views.replay import Views

        dataset = self._dataset(request)
        views = Views(Recipe.model_validate(request["recipe"]), dataset)
        sample = int(request["sample"])
        drawn = [_view(views, *pair, large=not nth) for nth, pair in enumerate(request["views"])]
        labels = {int(dataset.labels[sample]), *(view["partner_label"] for view in drawn)}
        original = dataset.image(sample)
        return {
            "original": _png(original, MAX_SIDE),
            "size": list(original.size),
            "label": int(dataset.labels[sample]),
            "names": _names(dataset.classes, labels | set(request["names"])),
            "views": drawn,
        }

    def _dataset(self, request: Mapping[str, Any]) -> ImageDataset:
        from cache_service.datasets import DatasetConfig, open_dataset

        found = []
        for document in request["datasets"]:
            key = json.dumps(document, sort_keys=True)
            if key not in self._opened:
                while len(self._opened) >= MAX_OPEN:
                    del self._opened[next(iter(self._opened))]
                self._opened[key] = open_dataset(DatasetConfig.model_validate(document))
            dataset = self._opened[key]
            if dataset.id.model_dump(mode="json") == request["dataset"]:
                return dataset
            found.append(dataset.id.sha256[:12])
        raise DatasetError(
            f"the cache was recorded of a dataset with digest {request['dataset']['sha256'][:12]}; "
            f"what opens under its name here has {', '.join(found)}.",
            hint="List that dataset in the server's configuration, with the root where it lies.",
        )


def _view(views: Views, seed: int, position: int, *, large: bool) -> dict[str, Any]:
    import PIL.Image

    batch = views.render(seed, [position])
    dataset: Any = views.dataset
    partner = int(batch.partners_B[0])
    picture = PIL.Image.fromarray(batch.pixels_BHW3[0])
    return {
        "seed": seed,
        "png": _png(picture, MAX_SIDE if large else THUMBNAIL_SIDE),
        "digest": int(batch.digests_B[0]),
        "origin": int(batch.origins_B[0]),
        "sample": int(batch.samples_B[0]),
        "partner": partner,
        "partner_label": int(dataset.labels[partner]),
        "weight": float(batch.weights_B[0]),
    }


def _png(picture: PIL.Image.Image, side: int) -> str:
    smaller = picture.copy()
    smaller.thumbnail((side, side))  # keeps what is small enough as it is
    file = io.BytesIO()
    smaller.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")


def _names(classes: tuple[str, ...], wanted: set[int]) -> dict[str, str]:
    return {str(label): classes[label][:MAX_NAME] for label in wanted if label < len(classes)}


def answer(painter: Painter, line: bytes) -> bytes:
    """The answer to one line, as one line: a scene, or `error` and `hint`."""
    document: dict[str, Any]
    try:
        document = painter.scene(json.loads(line))
    except KdCacheError as refusal:
        document = {"error": refusal.message, "hint": refusal.hint}
    except ImportError as missing:
        document = {
            "error": f"pictures need a library that is not installed: {missing}.",
            "hint": "Run `pip install 'kd-cache[train]'` on the server.",
        }
    return json.dumps(document).encode() + b"\n"


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer line by line until the input ends."""
    painter = Painter()
    for line in requests:
        answers.write(answer(painter, line))
        answers.flush()


def main() -> None:
    """Serve on the standard streams; what libraries print goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server decides
    os.nice(NICE)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
