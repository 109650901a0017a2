"""What an op is to the renderer: words in, parameters out; then image and parameters in, image out.

Shape letters: B samples, W words, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from cache_service.views.draws import Ints
from cache_service.views.philox import Words


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
