"""One recorded view of the demo, and the teacher's predictions for each of its cells.

Shape letters: B samples of a seed, S stored cells, R cells of all scales, C classes, H W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.format.cells import expand_cells
from cache_service.rows.reader import open_cache
from cache_service.views.replay import Views
from distill.losses import sdd_weights

NUM_LIKELIEST = 3
"""Classes of the whole image that the report lists."""


class CellGrid(NamedTuple):
    """The teacher's predictions for the cells of one scale, m x m, row by row.

    Attributes:
        scale: m.
        top: the likeliest class.
        label_logit: logit of the class that is on the label.
        complementary: whether exactly one of the predictions for cell and image is the label.
    """

    scale: int
    top: tuple[int, ...]
    label_logit: tuple[float, ...]
    complementary: tuple[bool, ...]


class SampleView(NamedTuple):
    """One recorded view, rendered anew, and what the cache holds about it.

    Attributes:
        pixels_HW3: uint8.
        likeliest: (class, logit, probability) of the whole image, best first.
    """

    seed: int
    position: int
    sample: int
    label: int
    classes: tuple[str, ...]
    pixels_HW3: NDArray[np.uint8]
    likeliest: tuple[tuple[int, float, float], ...]
    grids: tuple[CellGrid, ...]


def choose_view(url: str, dataset: DatasetConfig) -> SampleView:
    """The view of the first seed whose cells disagree most evenly with the whole image.

    Of the views that the teacher classifies correctly as a whole, it is the first of those in which
    the complementary cells come closest to half, so that there are some of each kind.
    """
    cache = open_cache(url)
    images, spec = open_dataset(dataset), cache.spec
    seed = cache.complete_seeds()[0]
    rows = cache.read(seed, 0, spec.dataset.num_samples)
    stored_BSC = spec.decode(rows, head=cache.head())
    cells_BRC = expand_cells(stored_BSC, spec.scales, spec.stored_scales)
    labels_B = images.labels[rows["sample"]]
    weights_BR = sdd_weights(
        torch.from_numpy(cells_BRC), torch.from_numpy(labels_B), complementary_weight=2.0
    )
    complementary_BR = weights_BR.numpy() > 1
    uneven_B = np.abs(complementary_BR[:, 1:].mean(axis=1) - 0.5)
    uneven_B[cells_BRC[:, 0].argmax(axis=1) != labels_B] = np.inf
    position = int(uneven_B.argmin())
    view = Views(spec.recipe, images).render(seed, np.array([position], np.int64))
    assert view.digests_B[0] == rows["digest"][position], "training has replayed this view"
    label = int(labels_B[position])
    return SampleView(
        seed=seed,
        position=position,
        sample=int(rows["sample"][position]),
        label=label,
        classes=images.classes or tuple(map(str, range(spec.teacher.num_classes))),
        pixels_HW3=view.pixels_BHW3[0],
        likeliest=_likeliest(cells_BRC[position, 0]),
        grids=_grids(spec.scales, cells_BRC[position], complementary_BR[position], label),
    )


def _likeliest(logits_C: NDArray[np.float32]) -> tuple[tuple[int, float, float], ...]:
    probabilities_C = np.exp(logits_C - logits_C.max())
    probabilities_C /= probabilities_C.sum()
    best = np.argsort(-logits_C, kind="stable")[:NUM_LIKELIEST]
    return tuple((int(c), float(logits_C[c]), float(probabilities_C[c])) for c in best)


def _grids(
    scales: tuple[int, ...],
    cells_RC: NDArray[np.float32],
    complementary_R: NDArray[np.bool_],
    label: int,
) -> tuple[CellGrid, ...]:
    grids, first = [], 0
    for scale in scales:
        here = slice(first, first + scale * scale)
        grids.append(
            CellGrid(
                scale=scale,
                top=tuple(cells_RC[here].argmax(axis=1).tolist()),
                label_logit=tuple(cells_RC[here, label].tolist()),
                complementary=tuple(complementary_R[here].tolist()),
            )
        )
        first = here.stop
    return tuple(grids)
