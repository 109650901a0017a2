"""Runs the S3 tests against a real object gateway on this machine: `make test-s3`.

Arguments go to pytest; without any, the tests of storage, caches, builds, students and the
service on a bucket run, and the walk of docs/scaling.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from support import s3
from support.gateway import INSTALL, Gateway, gateway

SELECTION = (
    "(s3 or bucket or staged or outage or gateway or objects or every_engine or walk) "
    "and not planned_bytes"
)

TESTS = [
    "tests/storage",
    "tests/cache",
    "tests/recording/test_s3.py",
    "tests/recording/test_without_locks.py",
    "tests/recording/test_plan.py",
    "tests/recording/test_equal_engines.py",
    "tests/remote/test_staged.py",
    "tests/api/test_bucket.py",
    "tests/docs/test_scaling_walk.py",
    "-k",
    SELECTION,
]


def main() -> int:
    """Start the server, run the tests, and stop it. Returns pytest's exit code."""
    missing = Gateway.missing()
    if missing:
        sys.stderr.write(f"not installed: {', '.join(missing)}. On Debian: {INSTALL}\n")
        return 2
    folder = tempfile.mkdtemp(prefix="kd-cache-s3-")
    try:
        began = time.monotonic()
        with gateway(folder, s3.KEY, s3.SECRET) as server:
            sys.stderr.write(f"S3 at {server.url} after {time.monotonic() - began:.0f} s\n")
            environment = {
                **os.environ,
                "KD_CACHE_S3_ENDPOINT": server.url,
                "KD_CACHE_S3_GATEWAY": folder,
                "AWS_ACCESS_KEY_ID": s3.KEY,
                "AWS_SECRET_ACCESS_KEY": s3.SECRET,
            }
            command = [sys.executable, "-m", "pytest", *(sys.argv[1:] or TESTS)]
            return subprocess.run(command, env=environment, check=False).returncode
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
