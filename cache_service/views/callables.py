"""Replay of a user's own pipeline: the global generators are seeded per view, then put back.

Such a pipeline draws from the libraries' own distributions, so it replays exactly under the same
library versions only; across versions the digest decides, as for every view. The generators belong
to the whole process, so a process renders such views from one thread at a time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cache_service.errors import ConfigError
from cache_service.plugins import load_object
from cache_service.views.draws import Ints, draw_words


class SeededPipeline:
    """`module:factory` as a renderer. The factory is called once per process."""

    def __init__(self, path: str, size: int) -> None:
        self._path = path
        self._size = size
        pipeline = load_object(path)()
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
        made = view.numpy() if isinstance(view, torch.Tensor) else np.asarray(view)
        pixels = made.transpose(1, 2, 0) if made.shape == (3, self._size, self._size) else made
        if pixels.shape != (self._size, self._size, 3) or pixels.dtype != np.uint8:
            raise ConfigError(
                f"augment.callable {self._path!r} made {type(view).__name__} "
                f"{made.dtype}{list(made.shape)}; a view is RGB uint8 of augment.size = "
                f"{self._size}.",
                hint="End the pipeline before ToTensor, ToDtype and Normalize.",
            )
        return pixels


@contextmanager
def _seeded(word: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators, and give back their states afterwards."""
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
