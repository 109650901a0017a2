"""The section `dataset` of a build or train file. The service imports it without Pillow."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from cache_service.config import EXPANDED, Frozen


class DatasetConfig(Frozen):
    """The dataset to use and its location."""

    name: Annotated[
        str,
        Field(
            min_length=1,
            description="folder, digits, torch/NAME or hfds/NAME (as in timm), or module:factory.",
        ),
        EXPANDED,
    ]
    root: Annotated[
        str | None, Field(min_length=1, description="Folder of the dataset."), EXPANDED
    ] = None
    split: Annotated[str, Field(min_length=1, description="Split of the dataset.")] = "train"
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

    hold_out: Annotated[
        float | None,
        Field(
            gt=0,
            lt=1,
            description="Share of each class of the training split to hold out: split `train` is "
            "without it, any other split consists of it.",
        ),
    ] = None
    labels: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Dataset folder without class folders: a file below root with the class of "
            "each image: `FILE CLASS` lines, a CSV, or a class per line in the order of the names.",
        ),
        EXPANDED,
    ] = None
    label_names: Annotated[
        str | None,
        Field(
            min_length=1,
            description="If the classes in `labels` are numbers: a file below root with the name "
            "of each number: a name per line from 0, or `NAME NUMBER` lines.",
        ),
        EXPANDED,
    ] = None

    pixel_range: Annotated[
        tuple[float, float] | None,
        Field(
            description="Values of black and white of images with other than 8 bits per channel, "
            "such as [0, 65535]."
        ),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        if self.pixel_range is not None and not self.pixel_range[0] < self.pixel_range[1]:
            raise ValueError("pixel_range names black first and then white, such as [0, 65535]")
        if self.labels is not None and self.name != "folder":
            raise ValueError("labels belongs to dataset folder; other datasets have their own")
        if self.label_names is not None and self.labels is None:
            raise ValueError("label_names tells what numbers in `labels` mean, which is not set")
        return self

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Caches store this section. Without defaults of later keys, old and new caches stay equal.
        document: dict[str, Any] = serialize(self)
        later = {"classes", "hold_out", "pixel_range"}
        return {name: value for name, value in document.items() if value or name not in later}
