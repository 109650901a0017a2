"""The digest of a view: 64 bits that change when a pixel does."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray


def digest64(*parts: bytes | NDArray[Any]) -> int:
    """BLAKE2b of the parts' bytes, one after the other, 8 bytes long: a little-endian uint64.

    Arrays must be contiguous. Borders between parts leave no trace, so their sizes must be fixed.
    """
    state = blake2b(digest_size=8)
    for part in parts:
        state.update(part.data if isinstance(part, np.ndarray) else part)
    return int.from_bytes(state.digest(), "little")
