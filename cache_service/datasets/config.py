"""`dataset:` of a build or train file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from cache_service.format.frozen import Frozen


class DatasetConfig(Frozen):
    """Which images and labels, and where they lie."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            description="folder, digits, torch/NAME or hfds/NAME (as in timm), or module:factory.",
        ),
    ]
    root: Annotated[str | None, Field(min_length=1, description="Folder or cache folder.")] = None
    split: Annotated[str, Field(min_length=1, description="Which part of it.")] = "train"
    args: dict[str, Any] = Field(
        default_factory=dict,
        description="Keyword arguments of the factory or of timm's create_dataset.",
    )
