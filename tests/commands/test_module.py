"""The command line as a module, where the package is not installed."""

from __future__ import annotations

import subprocess
import sys


def test_the_module_is_the_command():
    ended = subprocess.run(
        [sys.executable, "-m", "cli.main", "plan", "nowhere.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert "nowhere.yaml" in ended.stderr
