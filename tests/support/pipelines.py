"""A user's own augmentation, as `augment: {callable: support.pipelines:noisy}` names it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms import v2

NOISE = 3
"""Levels of noise; tests change it to play a library that draws otherwise."""


def noisy() -> Callable[[Image.Image], torch.Tensor]:
    crop = v2.RandomCrop(56)

    def pipeline(image: Image.Image) -> torch.Tensor:
        view = v2.functional.pil_to_tensor(crop(image)).int()
        noise = torch.randint(0, NOISE, view.shape)
        return (view + noise).clamp(0, 255).to(torch.uint8)

    return pipeline
