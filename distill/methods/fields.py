"""Types that the settings of several methods share, so that a bound stands in one place."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from distill.losses.nkd import SoftClasses

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
Standardize = Annotated[
    bool, Field(description="Give the logits of both sides mean 0 and spread 1 first.")
]
Classes = Annotated[
    SoftClasses, Field(description="The soft term's: others than the label, or all.")
]
