"""A full disk stops a build with exit code 4; what is committed stays, and the build resumes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from support.builds import build_document, record_toy, tree_bytes, write_file
from support.command import kd_cache

SIZES = {
    "dataset": {"name": "support.toys:patches", "args": {"num_samples": 640}},
    "seeds": "0:4",
}


@pytest.fixture
def small_disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    mount = tmp_path / "disk"
    mount.mkdir()
    options = ["-t", "tmpfs", "-o", "size=600k", "tmpfs", str(mount)]
    if subprocess.run(["mount", *options], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_ends_with_4_keeps_what_is_committed_and_resumes(tmp_path, small_disk):
    cache = small_disk / "c"
    file = write_file(tmp_path / "b.yaml", build_document(str(cache), **SIZES))
    ended = kd_cache("build", str(file))
    assert ended.code == 4, ended
    last = ended.err.strip().splitlines()[-1]
    assert last.startswith("error[out_of_space]: no space left")
    assert "run the same command again" in last
    committed = sorted(cache.glob("commits/*/*.json"))
    assert committed
    assert not list(cache.rglob("*.tmp"))
    assert kd_cache("verify", str(cache)).code == 4  # incomplete, and not a byte of it is wrong
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert kd_cache("build", str(file)).code == 0
    record_toy(str(tmp_path / "whole"), **SIZES)
    assert tree_bytes(Path(cache)) == tree_bytes(tmp_path / "whole")
