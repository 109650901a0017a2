"""From positions of a seed to views: what the teacher sees, and every student after it.

Shape letters: B positions requested, M samples rendered, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError
from cache_service.format.recipe import Recipe
from cache_service.views.decoded import DecodedImages, ImageSource
from cache_service.views.draws import Ints, Seeds
from cache_service.views.identity import digest64
from cache_service.views.mixing import NOT_MIXED, NUM_PARAMS, Mixer, mix, own_weights
from cache_service.views.order import draw_seeds, epoch_order
from cache_service.views.render import make_renderer


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
        self._images = DecodedImages(dataset, recipe.repeats)

    def __reduce__(self) -> tuple[type[Views], tuple[Recipe, ImageSource]]:
        return Views, (self.recipe, self.dataset)

    def render(
        self,
        seed: int,
        positions: NDArray[np.integer] | Sequence[int],
        *,
        with_origins: bool = True,
    ) -> ViewBatch:
        """The views at these positions of a seed, in the order of `positions`.

        An origin takes the checksum of a whole image. It is needed to record a view, and to explain
        a view that differs; `with_origins=False` leaves `origins_B` empty.

        A view depends on recipe, dataset, seed and position only, never on its batch: where a pair
        is cut by the batch's edge, the missing partner is rendered too.

        Raises:
            ConfigError: the seed is negative, or a position is outside the dataset.
        """
        positions_B = np.asarray(positions, dtype=np.int64)
        self._check(seed, positions_B)
        order_N = epoch_order(len(self.dataset), seed, self.recipe.repeats)
        pairs_BP = self.draw_pairs(seed, positions_B)
        others_B = np.where(pairs_BP[:, 0] == NOT_MIXED, positions_B, positions_B ^ 1)
        bases = self._render_bases(
            seed, order_N, np.union1d(positions_B, others_B), with_origins=with_origins
        )

        size = self.recipe.size
        pixels_BHW3 = np.empty((len(positions_B), size, size, 3), dtype=np.uint8)
        digests, origins = [], []
        rows = zip(
            positions_B.tolist(), others_B.tolist(), pairs_BP.tolist(), pixels_BHW3, strict=True
        )
        for position, other_position, pair, out_HW3 in rows:
            own, made_from = bases[position], [bases[position].origin]
            if pair[0] == NOT_MIXED:
                out_HW3[:] = own.pixels_HW3
            else:
                other = bases[other_position]
                out_HW3[:] = mix(own.pixels_HW3, other.pixels_HW3, pair)
                made_from += [other.origin, np.array(pair, dtype="<i8").tobytes()]
            digests.append(digest64(out_HW3))
            if with_origins:
                origins.append(digest64(*made_from))
        return ViewBatch(
            pixels_BHW3,
            np.array(digests, dtype=np.uint64),
            np.array(origins, dtype=np.uint64),
            order_N[positions_B],
            order_N[others_B],
            own_weights(pairs_BP, size),
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

    def draw_images(self, seed: int, positions_B: NDArray[np.int64]) -> Ints:
        """Parameters of the image ops of these views, [B, P]; see `Renderer.draw`."""
        order_N = epoch_order(len(self.dataset), seed, self.recipe.repeats)
        return self._renderer.draw(self._draw_seeds(seed, positions_B), order_N[positions_B])

    def draw_pairs(self, seed: int, positions_B: NDArray[np.int64]) -> Ints:
        """What happens to the pair of each position, [B, NUM_PARAMS].

        It is all zeros (not mixed) without a partner.
        """
        if not self._mixer:
            return np.zeros((len(positions_B), NUM_PARAMS), dtype=np.int64)
        evens_B = positions_B & ~1
        order_N = epoch_order(len(self.dataset), seed, self.recipe.repeats)
        pairs_BP = self._mixer.draw(self._draw_seeds(seed, evens_B), order_N[evens_B])
        pairs_BP[(positions_B ^ 1) >= len(order_N)] = 0
        return pairs_BP

    def _draw_seeds(self, seed: int, positions_B: NDArray[np.int64]) -> Seeds:
        return draw_seeds(len(self.dataset), seed, self.recipe.repeats, positions_B)

    def _render_bases(
        self,
        seed: int,
        order_N: NDArray[np.int32],
        positions_M: NDArray[np.int64],
        *,
        with_origins: bool,
    ) -> dict[int, _Base]:
        """View and origin at each position before mixing; the origin may be left out."""
        samples_M = order_N[positions_M]
        params_MP = self.draw_images(seed, positions_M)
        canonical_MP = params_MP.astype("<i8")
        rows = zip(positions_M.tolist(), samples_M.tolist(), params_MP.tolist(), strict=True)
        bases = {}
        for row, (position, sample, params) in enumerate(rows):
            decoded = self._images.get(sample)
            try:
                pixels_HW3 = self._renderer.pixels(decoded.image, params)
            except ConfigError as refusal:
                raise ConfigError(
                    f"sample {sample}: {refusal.message}", hint=refusal.hint
                ) from refusal
            origin = decoded.stamp() + canonical_MP[row].tobytes() if with_origins else b""
            bases[position] = _Base(pixels_HW3, origin)
        return bases
