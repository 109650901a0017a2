"""A user's own augmentation, `augment.callable`, seeded for each view.

A pipeline draws from the libraries' own distributions, so it replays exactly under the same library
versions only; under others the digest decides, as for every view.

Shape letters: B samples, P parameters, H W pixels.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cache_service.errors import ConfigError
from cache_service.plugins import call_factory, errors_in_one_line
from cache_service.views.draws import Ints, Seeds, draw_words


class SeededPipeline:
    """A user's pipeline, `module:factory`, with its random generators seeded for each view.

    These are the global generators of Python, NumPy and torch. An Albumentations transform also
    gets new generators of its own, and any other pipeline with a method `set_random_seed` is called
    by it. The factory is called once per process. The generators belong to the whole process, so a
    process renders such views from one thread at a time.

    Args:
        path: of the factory.
        size: side of the views, px.
        copies: whether the pipeline gets a copy of each image, because another view will be made
            of the same one.

    Attributes:
        pipeline: what the factory returned.
    """

    def __init__(self, path: str, size: int, *, copies: bool = False) -> None:
        self._path = path
        self._copies = copies
        self._size = size
        # Importing Albumentations would ask a server for its newest version, and print a warning.
        os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
        self.pipeline: Any = call_factory(path, {}, makes="pipeline")
        if not callable(self.pipeline):
            raise ConfigError(
                f"augment.callable {path!r} returned {type(self.pipeline).__name__}, not a "
                "callable.",
                hint="The name must be a factory: a function without arguments that returns the "
                "pipeline.",
            )
        self._call, self._seed = _adapted(self.pipeline)

    def draw(self, seed: Seeds, samples_B: NDArray[np.integer]) -> Ints:
        """One 64-bit seed per view, as int64 [B, 1]."""
        (words_B1,) = draw_words(seed, samples_B, [1])
        return words_B1.view(np.int64)

    def pixels(self, image: Image.Image, params: list[int]) -> NDArray[np.uint8]:
        """The view, [H, W, 3].

        Raises:
            ConfigError: the pipeline raised an error, or what it returned is not a view.
        """
        word = params[0] % 2**64
        with (
            errors_in_one_line(f"augment.callable {self._path!r} failed", ConfigError),
            _seeded(word),
        ):
            self._seed(word)
            view = self._call(image.copy() if self._copies else image)
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


def is_albumentations(pipeline: object) -> bool:
    """Whether an object is a transform of Albumentations, which is called by keyword."""
    return any(kind.__module__.startswith("albumentations.") for kind in type(pipeline).__mro__)


def _adapted(pipeline: Any) -> tuple[Callable[[Image.Image], Any], Callable[[int], None]]:
    """How to call a pipeline with an image, and how to seed the generators that it keeps."""
    if is_albumentations(pipeline):
        return lambda image: pipeline(image=np.array(image))["image"], _albumentations_seed(
            pipeline
        )
    if callable(getattr(pipeline, "set_random_seed", None)):
        return pipeline, lambda word: pipeline.set_random_seed(word % 2**32)
    return pipeline, lambda _: None


def _albumentations_seed(transform: Any) -> Callable[[int], None]:
    """Albumentations 2 keeps generators; version 1 used the global ones, which are seeded anyway.

    Its `set_random_seed` would give each transform generators of its own in the same state: two
    transforms of probability 0.5 would then always be applied together. Generators that all
    transforms share give independent draws.
    """
    if callable(getattr(transform, "set_random_state", None)):
        return lambda word: transform.set_random_state(
            np.random.default_rng(word),
            random.Random(word),  # noqa: S311 - not for secrets
        )
    if callable(getattr(transform, "set_random_seed", None)):
        return lambda word: transform.set_random_seed(word % 2**32)
    return lambda _: None


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
