"""One sample to its view before mixing: a recipe compiled once, then draws and pixels.

Shape letters: B samples, P parameters, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_service.format import recipe as settings
from cache_service.views.callables import SeededPipeline
from cache_service.views.draws import Ints, draw_words
from cache_service.views.ops import affine, auto, color, erasing, flip, framing
from cache_service.views.ops.base import ImageOp

_OPS: Mapping[type[Any], Callable[[Any, int], ImageOp]] = {
    settings.PadCrop: framing.PadCrop,
    settings.RandomResizedCrop: framing.RandomResizedCrop,
    settings.CenterCrop: framing.CenterCrop,
    settings.HorizontalFlip: flip.HorizontalFlip,
    settings.RandomAffine: affine.RandomAffine,
    settings.ColorJitter: color.ColorJitter,
    settings.RandAugment: auto.RandAugment,
    settings.TrivialAugment: auto.TrivialAugment,
    settings.RandomErasing: erasing.RandomErasing,
}


class Renderer(Protocol):
    """What makes views: a chain of declared ops, or a user's own pipeline."""

    def draw(self, seed: int, samples_B: NDArray[np.integer]) -> Ints:
        """Parameters of each sample's view: int64 [B, P], a pure function of seed and sample."""
        ...

    def pixels(self, image: Image.Image, params: list[int]) -> NDArray[np.uint8]:
        """The view of an RGB image under one row of parameters: [H, W, 3], H = W = size."""
        ...


class OpChain:
    """The image ops of a recipe, in order; op i draws from stream i of each sample."""

    def __init__(self, recipe: settings.Recipe) -> None:
        image_ops = [op for op in recipe.ops if not isinstance(op, settings.MIXING)]
        self._ops = [_OPS[type(op)](op, recipe.size) for op in image_ops]
        self._num_words = [op.num_words for op in self._ops]
        drawn = self._draw_each(0, np.zeros(0, dtype=np.int64))
        stops = np.cumsum([params_BP.shape[1] for params_BP in drawn]).tolist()
        starts = [0, *stops[:-1]]
        self._steps = [
            (op.apply, slice(start, stop))
            for op, start, stop in zip(self._ops, starts, stops, strict=True)
        ]

    def draw(self, seed: int, samples_B: NDArray[np.integer]) -> Ints:
        """The ops' parameters side by side."""
        return np.concatenate(self._draw_each(seed, samples_B), axis=1)

    def pixels(self, image: Image.Image, params: list[int]) -> NDArray[np.uint8]:
        """The image after every op."""
        for apply, columns in self._steps:
            image = apply(image, params[columns])
        return np.asarray(image)

    def _draw_each(self, seed: int, samples_B: NDArray[np.integer]) -> list[Ints]:
        words = draw_words(seed, samples_B, self._num_words)
        return [op.draw(words_BW) for op, words_BW in zip(self._ops, words, strict=True)]


def make_renderer(recipe: settings.Recipe) -> Renderer:
    """The renderer of a recipe. ConfigError where its callable cannot be loaded."""
    if recipe.callable is not None:
        return SeededPipeline(recipe.callable, recipe.size)
    return OpChain(recipe)
