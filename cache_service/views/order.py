"""The order in which a seed visits the samples: a recorded epoch is stored in this order.

It depends on the number of samples and the seed only, never on the recipe, so caches of different
teachers and recipes over one dataset line up position by position.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ORDER_KEY = int.from_bytes(b"kd-order", "big")
"""Key of the streams that orders are made from; draws and noise have keys of their own."""


@lru_cache(maxsize=4)
def epoch_order(num_samples: int, seed: int) -> NDArray[np.int32]:
    """Sample at each position of a seed: int32 [num_samples], read-only because it is shared.

    Each sample gets one Philox word, and samples are visited by ascending word. Equal words (one
    epoch of ImageNet in 20 million has a pair) keep the order of their samples.
    """
    key = np.array([ORDER_KEY, seed], dtype=np.uint64)
    words_N = np.random.Philox(key=key).random_raw(num_samples)
    order_N = np.argsort(words_N, kind="stable").astype(np.int32)
    order_N.flags.writeable = False
    return order_N


def positions_of(order_N: NDArray[np.int32]) -> NDArray[np.int32]:
    """Position of each sample: the inverse of `epoch_order`, by one scatter."""
    positions_N = np.empty_like(order_N)
    positions_N[order_N] = np.arange(len(order_N), dtype=np.int32)
    return positions_N
