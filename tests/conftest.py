"""One thread per process, and a path on which child processes find the toys of `tests/support`.

The suite runs on two cores, and threads of a used network would hang in a forked child.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
_TESTS = Path(__file__).parent
os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
