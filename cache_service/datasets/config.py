"""`dataset:` of a build or train file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

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
    classes: Annotated[
        Literal["natural", "text", "numbers"] | tuple[str, ...] | None,
        Field(
            description="Order of the classes by name: natural (2 before 10), text (10 before 2) "
            "or a list of all names; numbers drops the names."
        ),
    ] = None

    @model_serializer(mode="wrap")
    def _without_default(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Caches store their dataset section; those from before this setting have no such key.
        document: dict[str, Any] = serialize(self)
        return {name: value for name, value in document.items() if name != "classes" or value}
