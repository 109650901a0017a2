"""`dataset:` of a build or train file. Imported by the service, without Pillow and torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cache_service.config import Frozen


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
    classes: Annotated[
        Literal["natural", "text", "numbers"] | tuple[str, ...] | None,
        Field(
            description="Order of the classes by name: natural (2 before 10), text (10 before 2) "
            "or a list of all names; numbers drops the names."
        ),
    ] = None

    pixel_range: Annotated[
        tuple[float, float] | None,
        Field(
            description="Values of black and white of images that are not 8 bits deep, such as "
            "[0, 65535]."
        ),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        if self.pixel_range is not None and not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError("pixel_range names black first and then white, such as [0, 65535]")
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Caches store their dataset section; those from before these settings have no such keys.
        document: dict[str, Any] = serialize(self)
        later = {"classes", "pixel_range"}
        return {name: value for name, value in document.items() if value or name not in later}
