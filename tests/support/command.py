"""The kd-cache command in this process: what it prints and how it ends."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from typing import NamedTuple
from unittest import mock

from cli.main import run


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def kd_cache(*arguments: str) -> Ended:
    """Run `kd-cache ARGUMENTS`. A traceback fails the test that called it."""
    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    code = 0
    try:
        with (
            mock.patch.object(sys, "argv", ["kd-cache", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return Ended(code, out.getvalue(), err.getvalue())
