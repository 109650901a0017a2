"""A frame written plainly, to hold those of the service against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cache_service.format.codecs import Arrays, RowArray


def encode_frame(arrays: Sequence[RowArray], rows: Arrays, header: bytes) -> bytes:
    """A whole frame. `rows` has the arrays that `header` was made of, B rows of each."""
    pieces: list[bytes | memoryview] = [header]
    for array in arrays:
        dtype = np.dtype(array.dtype).newbyteorder("<")
        values = np.ascontiguousarray(rows[array.name], dtype)
        pieces.append(values.view(np.uint8).reshape(-1).data)
    return b"".join(pieces)
