"""Work done ahead, in order, by worker processes or in line: one door to torch's DataLoader."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from cache_service.errors import KdCacheError

K = TypeVar("K")
T = TypeVar("T")

PREFETCH = 2
"""Items ahead per worker: hides the jitter of decoding, and bounds memory."""

STALLED_S = 600
"""An item that takes so long means a dead or hung worker: an error, not an endless wait."""


class _Calls(Dataset[Any], Generic[K, T]):
    def __init__(self, make: Callable[[K], T]) -> None:
        self._make = make

    def __getitem__(self, key: K) -> T | KdCacheError:
        try:
            return self._make(key)
        except KdCacheError as refusal:
            # Raised in a worker it would come back wrapped in a traceback; as a value it does not.
            return refusal


def load_ahead(
    make: Callable[[K], T],
    keys: Iterable[K],
    *,
    workers: int,
    pin_memory: bool = False,
    context: str = "forkserver",
    stalled_s: float = STALLED_S,
) -> Iterator[T]:
    """`make(key)` for each key, in order.

    Args:
        make: picklable; returns tensors (which travel through shared memory) or small values.
        keys: what to make; taken a few ahead, so there may be many.
        workers: processes; 0 works in line.
        pin_memory: hand tensors over in page-locked memory.
        context: how processes start. `fork` would copy the threads of a network or a storage
            client into them, where they hang.
        stalled_s: an item that takes longer means a dead or hung worker.

    Raises:
        KdCacheError: as raised by `make`, in whichever process.
    """
    calls = _Calls(make)
    items: Iterator[Any]
    if workers == 0:
        items = (calls[key] for key in keys)
    else:
        processes = multiprocessing.get_context(context)
        # Imported once by the server instead of by each worker, which saves each some 4 s.
        processes.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
        items = iter(
            DataLoader(
                calls,
                batch_size=None,
                sampler=keys,
                num_workers=workers,
                prefetch_factor=PREFETCH,
                collate_fn=_as_it_is,
                pin_memory=pin_memory,
                multiprocessing_context=processes,
                worker_init_fn=_start_worker,
                timeout=stalled_s,
            )
        )
    for item in items:
        if isinstance(item, KdCacheError):
            raise item
        yield item


def _as_it_is(item: T) -> T:
    return item


def _start_worker(_worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
