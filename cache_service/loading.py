"""Makes items ahead of their use, in order, in worker processes or in line, by torch's DataLoader.

Workers are children of a fork server, so torch's own handler of dead children does not see them.
Their state is looked at every few seconds instead, and tensors are moved to shared memory where a
failure can still be returned to the parent: an item that is lost on the way would be awaited until
the timeout.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from cache_service.errors import KdCacheError, WorkersError
from cache_service.human_format import describe_error, human_bytes
from cache_service.interrupts import StoppedWaitingError, end_wait_if_stopped

K = TypeVar("K")
T = TypeVar("T")

PREFETCH = 2
"""Items ahead per worker: hides the jitter of decoding, and bounds memory."""

STALLED_S = 600
"""An item that takes so long means a hung worker: an error, not an endless wait."""

CHECK_S = 2
"""How often to check that workers are alive while an item is awaited."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Linux keeps tensors of several processes there
IN_LINE = "Set workers: 0 to do their work in this process"


class _Calls(Dataset[Any], Generic[K, T]):
    def __init__(self, make: Callable[[K], T], *, shared: bool) -> None:
        self._make = make
        self._shared = shared

    def __getitem__(self, key: K) -> T | KdCacheError:
        try:
            item = self._make(key)
            if self._shared:
                _share(item)
        except KdCacheError as refusal:
            # Raised in a worker it would come back wrapped in a traceback; as a value it does not.
            return refusal
        return item


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
        stalled_s: an item that takes longer means a hung worker.

    Raises:
        WorkersError: workers cannot start, died or hang.
        StoppedWaitingError: Ctrl-C or SIGTERM came, and no item for some seconds.
        KdCacheError: as raised by `make`, in whichever process.
    """
    calls = _Calls(make, shared=workers > 0)
    items: Iterator[Any]
    if workers == 0:
        items = (calls[key] for key in keys)
    else:
        processes = multiprocessing.get_context(context)
        # Imported once by the server instead of by each worker, which saves each some 4 s.
        processes.set_forkserver_preload([__name__, "torchvision.transforms.v2"])
        loader = DataLoader(
            calls,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            collate_fn=_as_it_is,
            pin_memory=pin_memory,
            multiprocessing_context=processes,
            worker_init_fn=_start_worker,
            timeout=CHECK_S,
        )
        items = _watched(loader, stalled_s)
    for item in items:
        if isinstance(item, KdCacheError):
            raise item
        yield item


def _watched(loader: DataLoader[Any], stalled_s: float) -> Iterator[Any]:
    """The loader's items; raises soon after a worker died, and where none arrives for
    `stalled_s`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Got pickle error")
            items = iter(loader)
    except (OSError, EOFError) as error:
        _discard_frames(error)
        raise WorkersError(
            f"worker processes cannot start: {describe_error(error)}.",
            hint=f"{IN_LINE}, or see that {SHARED_MEMORY} is writable and large enough{_sizes()}.",
        ) from error
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        _discard_frames(error)
        raise WorkersError(
            f"the dataset cannot be sent to worker processes: {describe_error(error)}.",
            hint=f"{IN_LINE}, or make it picklable.",
        ) from error
    while True:
        deadline = time.monotonic() + stalled_s
        try:
            item = _next(items, deadline)
        except StopIteration:
            return
        yield item


def _discard_frames(error: BaseException) -> None:
    """Delete torch's unfinished iterator in silence: its `__del__` fails, and would print why."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def _next(items: Iterator[Any], deadline: float) -> Any:
    while True:
        try:
            return next(items)
        except (ConnectionError, EOFError, FileNotFoundError) as error:
            if "in DataLoader worker process" in str(error):
                raise  # from the dataset
            # Tensors on their way are fetched from the worker that made them, which has gone.
            raise _died(items) from error
        except RuntimeError as error:
            text = str(error)
            if text.startswith("DataLoader timed out"):  # nothing yet, and all workers are alive
                try:
                    end_wait_if_stopped()
                except StoppedWaitingError:
                    for process in getattr(items, "_workers", ()):  # torch would await them for 5 s
                        process.terminate()
                    raise
                if time.monotonic() < deadline:
                    continue
                raise WorkersError(
                    "worker processes are alive, but gave nothing until the timeout.",
                    hint=f"{IN_LINE}, where a dataset that hangs can be seen.",
                ) from error
            if text.startswith("DataLoader worker"):
                raise _died(items) from error
            if text.startswith(("Too many open files", "received 0 items of ancdata")):
                raise WorkersError(
                    "worker processes ran out of file descriptors.",
                    hint=f"Raise the limit (ulimit -n 65536). {IN_LINE}.",
                ) from error
            raise


def _died(items: Iterator[Any]) -> WorkersError:
    # The exit codes are torch's private matter; without them the message still says what happened.
    processes = getattr(items, "_workers", ())
    multiprocessing.connection.wait([each.sentinel for each in processes], CHECK_S)
    codes = [each.exitcode for each in processes]
    died = [code for code in codes if code]
    if -signal.SIGBUS in died:
        return WorkersError(
            f"a worker process died of a bus error: {SHARED_MEMORY} is full{_sizes()}.",
            hint=f"{IN_LINE}, or enlarge it (docker run --shm-size=2g).",
        )
    if -signal.SIGKILL in died:
        return WorkersError(
            "a worker process was killed, likely because memory ran out.",
            hint=f"Set fewer workers. {IN_LINE}.",
        )
    code = f" with exit code {died[0]}" if died else ""
    return WorkersError(
        f"a worker process died{code}; what it printed says why.",
        hint=f"{IN_LINE}, where the error can be seen.",
    )


def _share(item: Any) -> None:
    """Move the tensors of an item to shared memory, as sending them to the parent would.

    Raises:
        WorkersError: there is no room. Without this check the kernel kills the process.
    """
    tensors = list(_tensors_in(item))
    needed = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
    free = _free_bytes()
    hint = f"{IN_LINE}, take a smaller batch_size, or enlarge it (docker run --shm-size=2g)."
    if free is not None and free < needed:
        raise WorkersError(
            f"a batch needs {human_bytes(needed)} of {SHARED_MEMORY}, where workers hand over "
            f"their views, and {human_bytes(free)} are free{_sizes()}.",
            hint=hint,
        )
    try:
        for tensor in tensors:
            tensor.share_memory_()  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        if "Too many open files" in str(error):
            hint = f"Raise the limit (ulimit -n 65536). {IN_LINE}."
        raise WorkersError(
            f"a worker process cannot share a batch: {describe_error(error)}.", hint=hint
        ) from error


def _tensors_in(item: Any) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from _tensors_in(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from _tensors_in(value)


def _free_bytes() -> int | None:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # not Linux
        return None
    return status.f_bavail * status.f_frsize


def _sizes() -> str:
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:
        return ""
    return f" (it holds {human_bytes(status.f_blocks * status.f_frsize)})"


def _as_it_is(item: T) -> T:
    return item


def _start_worker(_worker: int) -> None:
    # Ctrl-C reaches every process of a terminal; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
