"""From positions of a seed to views: what the teacher sees, and every student after it.

Shape letters: B positions requested, M samples rendered, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray
from PIL import Image

from cache_service.errors import ConfigError, DatasetError
from cache_service.format.recipe import Recipe
from cache_service.views.draws import Ints, epoch_order
from cache_service.views.identity import digest64
from cache_service.views.mixing import NOT_MIXED, NUM_PARAMS, Mixer, mix, own_weight
from cache_service.views.render import make_renderer


class ImageSource(Protocol):
    """The part of a dataset that views need."""

    def __len__(self) -> int: ...

    def image(self, sample: int) -> Image.Image:
        """The decoded image of a sample, in mode RGB."""
        ...


class ViewBatch(NamedTuple):
    """Views of some positions of a seed, with what identifies them."""

    pixels_BHW3: NDArray[np.uint8]
    digests_B: NDArray[np.uint64]
    """Of the pixels. Equal digests: the teacher saw this."""
    origins_B: NDArray[np.uint64]
    """Of the decoded images and the draws. Equal origins under unequal digests: only the rendering
    library changed."""
    samples_B: NDArray[np.int32]
    partners_B: NDArray[np.int32]
    """The sample mixed in; the own sample where unmixed."""
    weights_B: NDArray[np.float32]
    """Weight of the own label; 1.0 where unmixed."""


class _Base(NamedTuple):
    """A sample's view before mixing."""

    pixels_HW3: NDArray[np.uint8]
    origin: bytes


class Views:
    """A recipe bound to a dataset. Cheap to send to another process: it is rebuilt there."""

    def __init__(self, recipe: Recipe, dataset: ImageSource) -> None:
        self.recipe = recipe
        self.dataset = dataset
        self._renderer = make_renderer(recipe)
        self._mixer = Mixer(recipe)

    def __reduce__(self) -> tuple[type[Views], tuple[Recipe, ImageSource]]:
        return Views, (self.recipe, self.dataset)

    def render(self, seed: int, positions: NDArray[np.integer] | Sequence[int]) -> ViewBatch:
        """The views at these positions of a seed, in the order of `positions`.

        A view depends on recipe, dataset, seed and position only, never on its batch: where a pair
        is cut by the batch's edge, the missing partner is rendered too.

        Raises:
            ConfigError: the seed is negative, or a position is outside the dataset.
        """
        positions_B = np.asarray(positions, dtype=np.int64)
        self._check(seed, positions_B)
        order_N = epoch_order(len(self.dataset), seed)
        pairs_BP = self._draw_pairs(seed, order_N, positions_B)
        mixed_B = pairs_BP[:, 0] != NOT_MIXED
        samples_B = order_N[positions_B]
        partners_B = order_N[np.where(mixed_B, positions_B ^ 1, positions_B)]
        bases = self._render_bases(seed, np.union1d(samples_B, partners_B))

        size = self.recipe.size
        pixels_BHW3 = np.empty((len(positions_B), size, size, 3), dtype=np.uint8)
        digests, origins, weights = [], [], []
        rows = zip(
            samples_B.tolist(), partners_B.tolist(), pairs_BP.tolist(), pixels_BHW3, strict=True
        )
        for sample, partner, pair, out_HW3 in rows:
            own = bases[sample]
            if pair[0] == NOT_MIXED:
                out_HW3[:] = own.pixels_HW3
                origin = digest64(own.origin)
                weights.append(1.0)
            else:
                other = bases[partner]
                out_HW3[:] = mix(own.pixels_HW3, other.pixels_HW3, pair)
                origin = digest64(own.origin, other.origin, np.array(pair, dtype="<i8"))
                weights.append(own_weight(pair, size))
            digests.append(digest64(out_HW3))
            origins.append(origin)
        return ViewBatch(
            pixels_BHW3,
            np.array(digests, dtype=np.uint64),
            np.array(origins, dtype=np.uint64),
            samples_B,
            partners_B,
            np.array(weights, dtype=np.float32),
        )

    def _check(self, seed: int, positions_B: NDArray[np.int64]) -> None:
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed {seed} is outside 0 to 2**64 - 1.")
        num_samples = len(self.dataset)
        outside_B = (positions_B < 0) | (positions_B >= num_samples)
        if outside_B.any():
            raise ConfigError(
                f"position {positions_B[outside_B][0]} was requested, but a seed has positions "
                f"0 to {num_samples - 1}, one per sample."
            )

    def _draw_pairs(
        self, seed: int, order_N: NDArray[np.int32], positions_B: NDArray[np.int64]
    ) -> Ints:
        """What happens to the pair of each position; all zeros (not mixed) without a partner."""
        if not self._mixer:
            return np.zeros((len(positions_B), NUM_PARAMS), dtype=np.int64)
        pairs_BP = self._mixer.draw(seed, order_N[positions_B & ~1])
        pairs_BP[(positions_B ^ 1) >= len(order_N)] = 0
        return pairs_BP

    def _render_bases(self, seed: int, samples_M: NDArray[np.int32]) -> dict[int, _Base]:
        """View and origin of each sample before mixing: every image is decoded once."""
        params_MP = self._renderer.draw(seed, samples_M)
        canonical_MP = params_MP.astype("<i8")
        bases = {}
        for row, (sample, params) in enumerate(
            zip(samples_M.tolist(), params_MP.tolist(), strict=True)
        ):
            image = self.dataset.image(sample)
            if image.mode != "RGB":
                raise DatasetError(
                    f"sample {sample} came as a {image.mode} image; views are made of RGB.",
                    hint="Convert in the dataset: image.convert('RGB').",
                )
            origin = _stamp(image) + canonical_MP[row].tobytes()
            try:
                pixels_HW3 = self._renderer.pixels(image, params)
            except ConfigError as refusal:
                raise ConfigError(
                    f"sample {sample}: {refusal.message}", hint=refusal.hint
                ) from refusal
            bases[sample] = _Base(pixels_HW3, origin)
        return bases


def _stamp(image: Image.Image) -> bytes:
    """Size and checksum of a decoded image.

    CRC-32C, because it is there to notice another decoder or file, not to withstand a forger, and
    hashing the source of an ImageNet view costs 20 us this way and 600 us by BLAKE2b.
    """
    width, height = image.size
    return np.array([width, height, crc32c(image.tobytes())], dtype="<i8").tobytes()
