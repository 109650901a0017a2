"""The base of every model that crosses a border (file, command line, HTTP, Zarr attributes)."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Immutable, and closed: an unknown key is an error, because a typo must not pass."""

    model_config = ConfigDict(frozen=True, extra="forbid")
