"""Where every pixel of a view comes from, for recipes whose ops only copy, fill and blend pixels.

These ops give the same bytes on every device, because they need no resampling and no floating
point: crops, flips, erased boxes and mixing. The draws of a whole seed become a few arrays of
integers, which any library of arrays turns into views. No torch.

Shape letters: B boxes or positions, N positions, P parameters, Q pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.format.recipe import (
    MIXING,
    CenterCrop,
    Cutmix,
    HorizontalFlip,
    Mixup,
    PadCrop,
    RandomErasing,
    Recipe,
)
from cache_service.views.color_ops import MEAN_COLOR, noise_of_boxes
from cache_service.views.draws import ONE, Ints
from cache_service.views.geometry_ops import first_fit
from cache_service.views.mixing import CUTMIX, NOT_MIXED, own_weights
from cache_service.views.order import epoch_order
from cache_service.views.render import OpChain
from cache_service.views.replay import Views

COPYING = (PadCrop, CenterCrop, HorizontalFlip, RandomErasing, Mixup, Cutmix)
"""Ops that this module knows. center_crop resizes, but alike in every view of an image."""

_BOX_COLUMNS = 6


class Erased(NamedTuple):
    """The boxes that one op erases.

    Attributes:
        boxes_N6: top, left, bottom, right (px in the view; all 0 where nothing is erased), 1 if the
            content is mirrored, and the index of its first pixel in `content_Q3`.
        content_Q3: uint8 pixels of all boxes, row by row. It has one pixel, which fills every box,
            if `is_color`.
        is_color: whether the boxes are filled with one color.
    """

    boxes_N6: Ints
    content_Q3: NDArray[np.uint8]
    is_color: bool


class CopiedViews(NamedTuple):
    """All views of a seed, in order of position, as copies from framed images.

    A framed image is an image in the size of the view, with its border. All indices are int64.

    Attributes:
        samples_N: sample of each position.
        partners_N: position of the view that is mixed in; the own position if there is none.
        crops_N3: top and left edge in the framed image, px, and 1 if the crop is mirrored.
        erased: what is erased from the crop, in order.
        pairs_N5: weight of the view's own pixels outside of a box, in 65536ths, and the box (top,
            left, bottom, right, px) in which the partner's pixels are taken.
        weights_N: float32 weight of the own label.
    """

    samples_N: Ints
    partners_N: Ints
    crops_N3: Ints
    erased: tuple[Erased, ...]
    pairs_N5: Ints
    weights_N: NDArray[np.float32]


def other_ops(recipe: Recipe) -> list[str]:
    """What of a recipe does not copy pixels: names of ops, or the user's callable."""
    if recipe.callable is not None:
        return [recipe.callable]
    return sorted({op.op for op in recipe.ops if not isinstance(op, COPYING)})


def padding_of(recipe: Recipe) -> PadCrop:
    """The border of the framed images of a recipe that only copies pixels."""
    framing = recipe.ops[0]
    return framing if isinstance(framing, PadCrop) else PadCrop(padding=0)


def frame_images(views: Views) -> NDArray[np.uint8]:
    """Resize every image to the size of the view and add its border: [samples, H, W, 3]."""
    framing, recipe = padding_of(views.recipe), views.recipe
    side = recipe.size + 2 * framing.padding
    framed_NHW3 = np.empty((len(views.dataset), side, side, 3), np.uint8)
    border = ((framing.padding,) * 2, (framing.padding,) * 2, (0, 0))
    chain = OpChain(recipe)
    # With the center crop and all other parameters 0, a view is the resized image before padding.
    params = [0] * chain.columns[-1].stop
    if isinstance(recipe.ops[0], PadCrop):
        params[:2] = [framing.padding] * 2
    for sample, out_HW3 in enumerate(framed_NHW3):
        image_HW3 = chain.pixels(views.dataset.image(sample), params)
        out_HW3[:] = np.pad(image_HW3, border, mode=framing.mode)
    return framed_NHW3


def copy_views(views: Views, seed: int) -> CopiedViews:
    """Draw all views of a seed."""
    recipe = views.recipe
    order_N = epoch_order(len(views.dataset), seed, recipe.repeats)
    all_N = np.arange(len(order_N))
    params_NP = views.draw_images(seed, all_N)
    crops_N3 = np.zeros((len(order_N), 3), np.int64)
    erased: list[Erased] = []
    image_ops = [op for op in recipe.ops if not isinstance(op, MIXING)]
    for op, columns in zip(image_ops, OpChain(recipe).columns, strict=True):
        drawn_NP = params_NP[:, columns]
        if isinstance(op, PadCrop):
            crops_N3[:, :2] = drawn_NP
        elif isinstance(op, HorizontalFlip):
            crops_N3[:, 2] ^= drawn_NP[:, 0]
            for before in erased:
                _mirror(before.boxes_N6, drawn_NP[:, 0] == 1, recipe.size)
        elif isinstance(op, RandomErasing):
            erased.append(_erase(op, drawn_NP, recipe.size))
    pairs_NP = views.draw_pairs(seed, all_N)
    pairs_N5 = pairs_NP[:, 1:].copy()
    # Outside of the box of cutmix a view has its own pixels. One that is not mixed is blended with
    # itself, so its weight does not matter.
    pairs_N5[pairs_NP[:, 0] == CUTMIX, 0] = ONE
    return CopiedViews(
        samples_N=order_N.astype(np.int64),
        partners_N=np.where(pairs_NP[:, 0] == NOT_MIXED, all_N, all_N ^ 1),
        crops_N3=crops_N3,
        erased=tuple(erased),
        pairs_N5=pairs_N5,
        weights_N=own_weights(pairs_NP, recipe.size),
    )


def _erase(op: RandomErasing, drawn_NP: Ints, size: int) -> Erased:
    boxes_N6 = np.zeros((len(drawn_NP), _BOX_COLUMNS), np.int64)
    erased_B, boxes = [], []
    for position in np.flatnonzero(drawn_NP[:, 0]).tolist():
        box = first_fit(drawn_NP[position, 2:].tolist(), size, size, room=1)
        if box is not None:
            erased_B.append(position)
            boxes.append(box)
    if not boxes:
        return Erased(boxes_N6, np.array([MEAN_COLOR], np.uint8), is_color=True)
    boxes_B4 = np.array(boxes, np.int64)
    top_B, left_B, height_B, width_B = boxes_B4.T
    boxes_N6[erased_B, :4] = np.stack([top_B, left_B, top_B + height_B, left_B + width_B], axis=1)
    if op.fill == "mean":
        return Erased(boxes_N6, np.array([MEAN_COLOR], np.uint8), is_color=True)
    pixels_B = height_B * width_B
    boxes_N6[erased_B, 5] = np.cumsum(pixels_B) - pixels_B
    return Erased(boxes_N6, noise_of_boxes(drawn_NP[erased_B, 1], pixels_B), is_color=False)


def _mirror(boxes_N6: Ints, chosen_N: NDArray[np.bool_], size: int) -> None:
    """Mirror the chosen boxes and their content, in place."""
    chosen_N = chosen_N & (boxes_N6[:, 2] > 0)  # positions without a box keep zeros
    boxes_N6[chosen_N, 1], boxes_N6[chosen_N, 3] = (
        size - boxes_N6[chosen_N, 3],
        size - boxes_N6[chosen_N, 1],
    )
    boxes_N6[chosen_N, 4] ^= 1
