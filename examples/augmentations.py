"""Augmentation pipelines of three libraries, as `augment.callable` names them.

    augment: {callable: "examples/augmentations.py:albumentations_crop", size: 224}

Each function returns a pipeline from an RGB image to a uint8 view of 224 x 224. None of them ends
in ToTensor or Normalize: views are compared as uint8 pixels, and normalized for each network later.
"""

from __future__ import annotations

from typing import Any

SIZE = 224


def torchvision_crop() -> Any:
    """torchvision v2. It draws from torch's global generator, which is seeded for each view."""
    from torchvision.transforms import v2

    return v2.Compose(
        [
            v2.RandomResizedCrop(SIZE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.TrivialAugmentWide(),
            v2.PILToTensor(),  # not ToTensor, which scales to 0..1
            v2.RandomErasing(p=0.25),
        ]
    )


def albumentations_crop() -> Any:
    """Albumentations. Return the Compose itself: the generators that it keeps are then seeded."""
    import albumentations

    return albumentations.Compose(
        [
            albumentations.RandomResizedCrop((SIZE, SIZE)),
            albumentations.HorizontalFlip(p=0.5),
            albumentations.ColorJitter(p=0.5),
            albumentations.CoarseDropout(p=0.25),
        ]
    )


def timm_crop() -> Any:
    """timm's training transform, without its normalization (`normalize=False`).

    `re_prob` would erase after normalization, so it is left at 0; the op `random_erasing`, or
    RandomErasing of torchvision on uint8 pixels, erases in views.
    """
    from timm.data import create_transform

    return create_transform(
        SIZE, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", normalize=False
    )
