"""A disk that is small: a tmpfs, where this process may mount one."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount `size` (such as `1m`) of memory at `folder`; skips where only root may."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a tmpfs; the RLIMIT_FSIZE form runs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
