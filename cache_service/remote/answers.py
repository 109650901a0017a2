"""Is a frame the answer to what was asked? Every one is held against it before a row is used.

Shape letters: B rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError
from cache_service.format.codecs import Arrays
from cache_service.format.frame import decode_frame
from cache_service.format.layout import RowArray


def checked_rows(
    body: bytes,
    checksum: str | None,
    *,
    arrays: Sequence[RowArray],
    metadata: Mapping[str, str],
    samples_B: NDArray[np.int32],
    what: str,
) -> Arrays:
    """The rows of a frame, copied out of it.

    Args:
        body: of the answer.
        checksum: what came with it.
        arrays: those asked for, `sample` among them.
        metadata: what the frame must say of itself.
        samples_B: whose rows these must be, in order.
        what: the question, for messages.

    Raises:
        CorruptError: damaged, of another shape or cache, of other samples, or not all numbers.
    """
    rows = decode_frame(
        body,
        checksum=checksum,
        arrays=arrays,
        num_rows=len(samples_B),
        metadata=metadata,
        what=what,
    )
    if not np.array_equal(rows["sample"], samples_B):
        first = int(np.flatnonzero(rows["sample"] != samples_B)[0])
        raise CorruptError(
            f"{what} answered sample {int(rows['sample'][first])} in row {first}, where sample "
            f"{int(samples_B[first])} belongs."
        )
    for name, values in rows.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise CorruptError(f"{what} answered {name} with NaN or infinity: nobody records that.")
    # A frame aligns its values loosely, and its bytes are not to be written to.
    return {name: values.astype(values.dtype.newbyteorder("=")) for name, values in rows.items()}
