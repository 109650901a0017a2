"""Images and a teacher that take their time, so that a build can be interrupted or predicted."""

from __future__ import annotations

import time
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from support.toys import Patches, TinyNet


class SlowPatches(Patches):
    """Toys whose images are slow to open; what is on them does not depend on it."""

    def __init__(self, delay_s: float = 0.01, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._delay_s = delay_s

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        time.sleep(self._delay_s)
        return super().__getitem__(index)


def slow_patches(**arguments: Any) -> SlowPatches:
    return SlowPatches(**arguments)


class SlowNet(TinyNet):
    """A toy teacher that takes its time for every image of a batch."""

    delay_s = 0.01

    def forward_features(self, images_B3HW: Tensor) -> Tensor:
        time.sleep(self.delay_s * len(images_B3HW))
        return super().forward_features(images_B3HW)


def slow_net() -> SlowNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return SlowNet()
