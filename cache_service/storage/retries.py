"""For how long a server or a bucket that does not answer is asked again."""

from __future__ import annotations

import random
from typing import NamedTuple

WARN_AFTER_S = 10.0
"""An outage of this length is logged: a run that waits looks like one that hangs."""

_JITTER = random.SystemRandom()
"""Not the global generator: that one belongs to the training run."""


class RetryPolicy(NamedTuple):
    """For how long failed requests are repeated.

    Attributes:
        first_s: before the server has answered for the first time, in seconds. It is short, so
            that a wrong address is reported soon.
        total_s: later, for one request, in seconds: a server restarts, a machine reboots.
        attempts: how many damaged or invalid responses are accepted before giving up.
        base_s: the first pause in seconds; each further one is twice as long.
        cap_s: the longest pause in seconds.
    """

    first_s: float = 10.0
    total_s: float = 300.0
    attempts: int = 6
    base_s: float = 0.1
    cap_s: float = 2.0

    def pause_s(self, failures: int) -> float:
        """The pause after this many failures: exponential, with jitter."""
        longest = min(self.cap_s, self.base_s * 2.0 ** min(failures, 30))
        return longest * _JITTER.uniform(0.5, 1.0)


DEFAULT_RETRIES = RetryPolicy()

NO_RETRIES = RetryPolicy(first_s=0.0, total_s=0.0, attempts=1)
"""For the service, whose clients repeat failed requests themselves."""
