"""The base of every model that crosses a border (file, command line, HTTP, Zarr attributes)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable, and closed: an unknown key is an error, because a typo must not pass.

    Numbers are finite: JSON has no NaN, and a fingerprint over one would equal no other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
