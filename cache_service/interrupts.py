"""Ctrl-C and SIGTERM: finish what is under way, keep it, then stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

POLL_S = 0.1
"""Interval at which a wait checks for a stop request, seconds."""


class StopRequest:
    """Whether somebody asked the run to stop."""

    requested = False


class StoppedWaitingError(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came while something was awaited. Nothing was half done."""


_REQUESTS: list[StopRequest] = []
"""Those of this process, which any of its threads may look at."""


def end_wait_if_stopped() -> None:
    """Raise StoppedWaitingError if somebody asked the run to stop."""
    if any(request.requested for request in _REQUESTS):
        raise StoppedWaitingError


def pause(seconds: float) -> None:
    """Sleep, in any thread; raises StoppedWaitingError as soon as somebody asks to stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        end_wait_if_stopped()
        time.sleep(min(left, POLL_S))


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first signal into a request; a second one acts as it did before.

    Handlers belong to the main thread. In any other one nothing is installed, and nothing is ever
    requested.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            # None stands for a handler that was not installed from Python; it cannot be put back.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def note(_number: int, _frame: FrameType | None) -> None:
        request.requested = True
        restore()

    for number in SIGNALS:
        signal.signal(number, note)
    _REQUESTS.append(request)
    try:
        yield request
    finally:
        _REQUESTS.remove(request)
        restore()
