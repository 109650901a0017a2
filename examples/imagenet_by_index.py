"""A folder of ImageNet's classes whose names begin with the class index, such as 016_n01560419.

The labels are those indices, so that all 1000 outputs of a teacher are recorded, where an ordinary
folder of 64 classes takes 64 of them.

    dataset: {name: examples/imagenet_by_index.py:folder, root: data/imagenet-64}
"""

from __future__ import annotations

from pathlib import Path

import PIL.Image

NUM_CLASSES = 1000


class ByIndex:
    """Images and class indices, in the order of their paths."""

    def __init__(self, root: str) -> None:
        self.paths = sorted(path for path in Path(root).glob("*/*") if path.is_file())
        self.targets = [int(path.parent.name.partition("_")[0]) for path in self.paths]
        self.classes = [f"output {index}" for index in range(NUM_CLASSES)]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[PIL.Image.Image, int]:
        """The image and its class index."""
        return PIL.Image.open(self.paths[index]).convert("RGB"), self.targets[index]


def folder(root: str) -> ByIndex:
    """Every image below ROOT."""
    return ByIndex(root)
