"""Images that take their time, so that a build can be interrupted."""

from __future__ import annotations

import time
from typing import Any

from PIL import Image

from support.toys import Patches


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
