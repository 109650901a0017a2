"""Mixing with the neighbor in the seed's order: positions 2k and 2k+1 are a pair.

Both members of a pair get one draw, keyed by the sample at 2k, and each keeps the same weight w of
itself: view(2k) = w a + (1-w) b and view(2k+1) = w b + (1-w) a. Pixels are blended in integers, so
a mixed view is the same on every machine.

Shape letters: B positions, P parameters, H W pixels.
Source: Zhang et al., mixup (ICLR 2018); Yun et al., CutMix (ICCV 2019), boxes as in torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache_service.format.recipe import Cutmix, Mixup, Recipe
from cache_service.views.draws import ONE, Ints, Seeds, Words, below, beta_fixed, chance, draw_words

Pixels: TypeAlias = NDArray[np.uint8]

NOT_MIXED, MIXUP, CUTMIX = 0, 1, 2
"""First parameter of a pair: what happens to it."""

NUM_PARAMS = 6
"""Kind, weight (65536ths), then top, left, bottom, right of the box (px, 0 for mixup)."""

_WORDS_PER_OP = 4
"""Happens, weight, and the two coordinates of the box's middle."""


class Mixer:
    """The mixing ops of a recipe. With two of them, each pair draws one with equal chance."""

    def __init__(self, recipe: Recipe) -> None:
        self._size = recipe.size
        self._num_streams = len(recipe.ops)
        self._ops = [(i, op) for i, op in enumerate(recipe.ops) if isinstance(op, Mixup | Cutmix)]

    def __bool__(self) -> bool:
        return bool(self._ops)

    def draw(self, seed: Seeds, evens_B: NDArray[np.integer]) -> Ints:
        """Parameters of each pair, int64 [B, 6], from the samples at the pairs' even positions.

        `seed` is one for all pairs, or that of the view at each even position.
        """
        # The choice is read from the stream after the ops' own, so it changes no op's words.
        num_words = [0] * self._num_streams
        for stream, _ in self._ops:
            num_words[stream] = _WORDS_PER_OP
        *words, choice_BW = draw_words(seed, evens_B, [*num_words, 1])
        params = [self._draw_op(op, words[stream]) for stream, op in self._ops]
        chosen_B = below(choice_BW[:, 0], len(params))
        return np.stack(params)[chosen_B, np.arange(len(evens_B))]

    def _draw_op(self, op: Mixup | Cutmix, words_BW: Words) -> Ints:
        params_BP = np.zeros((len(words_BW), NUM_PARAMS), dtype=np.int64)
        weight_B = beta_fixed(words_BW[:, 1], op.alpha)
        params_BP[:, 0] = MIXUP if isinstance(op, Mixup) else CUTMIX
        params_BP[:, 1] = weight_B
        if isinstance(op, Cutmix):
            # Half a side is sqrt(1 - weight) / 2 of the view's; the operand is below 2**24, so the
            # root is exact where it is a whole number and never reaches the next one.
            half_B = np.sqrt((ONE - weight_B) * self._size**2 // (4 * ONE)).astype(np.int64)
            for axis in range(2):
                middle_B = below(words_BW[:, 2 + axis], self._size)
                params_BP[:, 2 + axis] = np.maximum(middle_B - half_B, 0)
                params_BP[:, 4 + axis] = np.minimum(middle_B + half_B, self._size)
        params_BP[~chance(words_BW[:, 0], op.prob)] = 0
        return params_BP


def mix(own_HW3: Pixels, partner_HW3: Pixels, params: Sequence[int]) -> Pixels:
    """The view of `own` in its pair: a new array."""
    kind, weight, top, left, bottom, right = params
    if kind == CUTMIX:
        mixed_HW3 = own_HW3.copy()
        mixed_HW3[top:bottom, left:right] = partner_HW3[top:bottom, left:right]
        return mixed_HW3
    blend_HW3 = own_HW3.astype(np.uint32)
    blend_HW3 *= np.uint32(weight)
    blend_HW3 += partner_HW3 * np.uint32(ONE - weight)
    blend_HW3 += np.uint32(ONE // 2)  # halves upward
    blend_HW3 >>= np.uint32(16)
    return blend_HW3.astype(np.uint8)


def own_weights(pairs_BP: Ints, size: int) -> NDArray[np.float32]:
    """Weight of each view's own label: the blend's weight, or what the box left of the area."""
    kind_B, weight_B, top_B, left_B, bottom_B, right_B = pairs_BP.T
    outside_B = 1.0 - (bottom_B - top_B) * (right_B - left_B) / size**2
    weights_B = np.where(kind_B == CUTMIX, outside_B, weight_B / ONE)
    return np.where(kind_B == NOT_MIXED, 1.0, weights_B).astype(np.float32)
