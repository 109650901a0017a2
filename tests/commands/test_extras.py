"""A command whose extra is not installed says which one, in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.builds import build_document, write_file
from support.caches import make_spec, write_cache

WITHOUT = """
import sys
for name in ("torch", "torchvision", "timm", "PIL"):
    sys.modules[name] = None  # as if it were not installed
from cli.main import run
run()
"""


def without_torch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("command", ["plan", "build", "train"])
def test_the_missing_extra_is_named(tmp_path, command):
    file = write_file(tmp_path / "b.yaml", build_document(str(tmp_path / "c")))
    done = without_torch(command, str(file))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error[config]: this command needs ")
    assert "pip install 'kd-cache[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_looking_at_a_cache_needs_no_extra(tmp_path):
    write_cache(str(tmp_path / "c"), make_spec())
    assert without_torch("info", str(tmp_path / "c")).returncode == 0
    done = without_torch("verify", str(tmp_path / "c"))
    assert done.returncode == 0, done.stderr
    assert "100 rows in 4 shards are intact" in done.stdout
