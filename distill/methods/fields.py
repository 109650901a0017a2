"""Types that the settings of several methods share, so that a bound stands in one place."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

Temperature = Annotated[
    float, Field(gt=0, le=1000, description="Divides logits before the softmax of both sides.")
]
Share = Annotated[
    float, Field(ge=0, le=1, description="Share of the teacher; labels get the rest.")
]
Weight = Annotated[float, Field(ge=0, le=1000, description="Factor of a term.")]
WarmupEpochs = Annotated[
    float, Field(ge=0, le=100_000, description="Epochs until the teacher has its full weight.")
]
ComplementaryWeight = Annotated[
    float, Field(ge=0, le=100, description="Of a cell that contradicts the whole image.")
]
