"""From one sample to its view before mixing: a recipe is compiled once, then gives draws and
pixels.

A recipe is a chain of declared ops, or a user's own pipeline (`cache_service.views.pipeline`).

Shape letters: B samples, W words, P parameters, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_service.format import recipe as settings
from cache_service.views import auto_augment, color_ops, geometry_ops
from cache_service.views.draws import Ints, Seeds, Words, draw_words
from cache_service.views.pipeline import SeededPipeline


class Renderer(Protocol):
    """Makes views from samples."""

    def draw(self, seed: Seeds, samples_B: NDArray[np.integer]) -> Ints:
        """Parameters of each sample's view: int64 [B, P], a pure function of seed and sample.

        `seed` is one for all samples, or one for each.
        """
        ...

    def pixels(self, image: Image.Image, params: list[int]) -> NDArray[np.uint8]:
        """The view of an RGB image under one row of parameters: [H, W, 3], H = W = size."""
        ...


def make_renderer(recipe: settings.Recipe) -> Renderer:
    """The renderer of a recipe.

    Raises:
        ConfigError: its callable cannot be loaded, or is no factory of a pipeline.
    """
    if recipe.callable is not None:
        return SeededPipeline(recipe.callable, recipe.size, copies=recipe.repeats > 1)
    return OpChain(recipe)


class ImageOp(Protocol):
    """One op of a recipe, bound to its settings and to the side of the view.

    All randomness is in `draw`; `apply` is a pure function and never changes the image it is given,
    which may be the dataset's own.
    """

    num_words: int
    """Random words that `draw` takes per sample, used or not."""

    def draw(self, words_BW: Words) -> Ints:
        """Parameters of each sample: int64 [B, P], integers or counts of 65536ths."""
        ...

    def apply(self, image: Image.Image, params: Sequence[int]) -> Image.Image:
        """The image with one sample's parameters applied."""
        ...


_OPS: Mapping[type[Any], Callable[[Any, int], ImageOp]] = {
    settings.PadCrop: geometry_ops.PadCrop,
    settings.RandomResizedCrop: geometry_ops.RandomResizedCrop,
    settings.CenterCrop: geometry_ops.CenterCrop,
    settings.HorizontalFlip: geometry_ops.HorizontalFlip,
    settings.RandomAffine: geometry_ops.RandomAffine,
    settings.ColorJitter: color_ops.ColorJitter,
    settings.RandAugment: auto_augment.RandAugment,
    settings.TrivialAugment: auto_augment.TrivialAugment,
    settings.RandomErasing: color_ops.RandomErasing,
}


class OpChain:
    """The image ops of a recipe, in order; op i draws from stream i of each sample.

    Attributes:
        columns: for each op, its columns of the parameters.
    """

    def __init__(self, recipe: settings.Recipe) -> None:
        image_ops = [op for op in recipe.ops if not isinstance(op, settings.MIXING)]
        self._ops = [_OPS[type(op)](op, recipe.size) for op in image_ops]
        self._num_words = [op.num_words for op in self._ops]
        without_samples = self._draw_each(0, np.zeros(0, dtype=np.int64))
        stops = np.cumsum([params_BP.shape[1] for params_BP in without_samples]).tolist()
        starts = [0, *stops[:-1]]
        self.columns = [slice(*ends) for ends in zip(starts, stops, strict=True)]

    def draw(self, seed: Seeds, samples_B: NDArray[np.integer]) -> Ints:
        """The ops' parameters side by side."""
        return np.concatenate(self._draw_each(seed, samples_B), axis=1)

    def pixels(self, image: Image.Image, params: list[int]) -> NDArray[np.uint8]:
        """The image after every op."""
        for op, columns in zip(self._ops, self.columns, strict=True):
            image = op.apply(image, params[columns])
        return np.asarray(image)

    def _draw_each(self, seed: Seeds, samples_B: NDArray[np.integer]) -> list[Ints]:
        words = draw_words(seed, samples_B, self._num_words)
        return [op.draw(words_BW) for op, words_BW in zip(self._ops, words, strict=True)]
