"""How much memory a run took at its worst, above what its process held before."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from its creation on.

    On a GPU this counts what torch allocates there; elsewhere the resident memory of the process.
    Libraries that are loaded before do not count, those loaded later do.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)
        else:
            forget_peak()
            self._before = peak_resident_bytes()

    def above_start(self) -> int:
        """Bytes at the peak beyond those at the start."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        return peak_resident_bytes() - self._before


def forget_peak() -> None:
    """Make the present size the peak, where the system can. Loading libraries has a peak too."""
    if CLEAR_REFS.exists():
        try:
            CLEAR_REFS.write_text("5")
        except OSError:  # some containers forbid it; then a smaller run may show as 0
            return


def peak_resident_bytes() -> int:
    """The most memory this process has held so far."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) * 1024  # kB means 1,024 bytes there
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
