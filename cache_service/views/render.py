"""From one sample to its view before mixing: a recipe is compiled once, then gives draws and
pixels.

A recipe is a chain of declared ops, or a user's own pipeline. A pipeline draws from the libraries'
own distributions, so it replays exactly under the same library versions only; under others the
digest decides, as for every view.

Shape letters: B samples, W words, P parameters, H W pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cache_service.errors import ConfigError
from cache_service.format import recipe as settings
from cache_service.plugins import call_factory
from cache_service.views import auto_augment, color_ops, geometry_ops
from cache_service.views.draws import Ints, Words, draw_words


class Renderer(Protocol):
    """Makes views from samples."""

    def draw(self, seed: int, samples_B: NDArray[np.integer]) -> Ints:
        """Parameters of each sample's view: int64 [B, P], a pure function of seed and sample."""
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
        return SeededPipeline(recipe.callable, recipe.size)
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
    """The image ops of a recipe, in order; op i draws from stream i of each sample."""

    def __init__(self, recipe: settings.Recipe) -> None:
        image_ops = [op for op in recipe.ops if not isinstance(op, settings.MIXING)]
        self._ops = [_OPS[type(op)](op, recipe.size) for op in image_ops]
        self._num_words = [op.num_words for op in self._ops]
        without_samples = self._draw_each(0, np.zeros(0, dtype=np.int64))
        stops = np.cumsum([params_BP.shape[1] for params_BP in without_samples]).tolist()
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


class SeededPipeline:
    """A user's pipeline, `module:factory`, with the global generators seeded for each view.

    The factory is called once per process. The generators belong to the whole process, so a process
    renders such views from one thread at a time.
    """

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._size = size
        pipeline = call_factory(path, {}, makes="pipeline")
        if not callable(pipeline):
            raise ConfigError(
                f"augment.callable {path!r} returned {type(pipeline).__name__}, not a callable.",
                hint="The name must be a factory: a function without arguments that returns the "
                "pipeline.",
            )
        self._pipeline: Callable[[Image.Image], Any] = pipeline

    def draw(self, seed: int, samples_B: NDArray[np.integer]) -> Ints:
        """One 64-bit seed per view, as int64 [B, 1]."""
        (words_B1,) = draw_words(seed, samples_B, [1])
        return words_B1.view(np.int64)

    def pixels(self, image: Image.Image, params: list[int]) -> NDArray[np.uint8]:
        """The view, [H, W, 3]."""
        with _seeded(params[0] % 2**64):
            view = self._pipeline(image)
        array = view.numpy() if isinstance(view, torch.Tensor) else np.asarray(view)
        is_planar = array.shape == (3, self._size, self._size)
        pixels = array.transpose(1, 2, 0) if is_planar else array
        if pixels.shape != (self._size, self._size, 3) or pixels.dtype != np.uint8:
            raise ConfigError(
                f"augment.callable {self._path!r} returned {type(view).__name__} "
                f"{array.dtype}{list(array.shape)}; a view is RGB uint8 of augment.size = "
                f"{self._size}.",
                hint="End the pipeline before ToTensor, ToDtype and Normalize.",
            )
        return pixels


@contextmanager
def _seeded(word: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators, and restore their states afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(word)
        np.random.seed(word % 2**32)
        # torch.manual_seed would also visit every accelerator: 95 us instead of 3.
        torch.default_generator.manual_seed(word % 2**63)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
