"""What one slow worker costs a build: fixed parts against shards that are handed out.

    python benchmarks/slow_worker.py [--seeds N] [--rounds N]

Two workers record the same shards, six a seed, and one of them is stopped for three quarters of the
time.
Prints the seconds from the first commit to the last: with two `--shard` parts, and with two actors
of the Ray engine, in turn.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil

STOPPED_S, RUNNING_S = 0.15, 0.05
"""Of each period of the slow worker, seconds."""

BUILD = """
cache: {cache}
dataset: {{name: digits}}
augment: {{size: 32, ops: [{{op: pad_crop, padding: 3}}]}}
seeds: 0:{seeds}
teacher: {{model: resnet8x4, allow_untrained: true}}
layout: {{shard_rows: 256, chunk_rows: 256}}
workers: 0
device: cpu
"""


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """`kd-cache build` in a folder."""
    command = [sys.executable, "-m", "cli.main", "build", "build.yaml", *options]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def recorder(engine: str, builder: int) -> psutil.Process | None:
    """A process that records for a builder; None until there is one."""
    if engine == "parts":
        return psutil.Process(builder)
    for each in psutil.Process(builder).children(recursive=True):
        with suppress(psutil.Error):
            if each.cmdline()[0].startswith("ray::Recorder"):
                return each
    return None


def slow_down(engine: str, builder: int, done: threading.Event) -> None:
    """Stop a recording process for three quarters of the time."""
    slow = None
    with suppress(psutil.NoSuchProcess):
        while not done.is_set() and slow is None:
            time.sleep(0.1)
            slow = recorder(engine, builder)
        while slow is not None and not done.is_set():
            slow.send_signal(signal.SIGSTOP)
            time.sleep(STOPPED_S)
            slow.send_signal(signal.SIGCONT)
            time.sleep(RUNNING_S)


def seconds(engine: str, seeds: int) -> float:
    """From the first commit to the last."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "build.yaml").write_text(BUILD.format(cache="cache", seeds=seeds))
        if engine == "parts":
            builders = [start(folder, "--shard", f"{part}/2") for part in (0, 1)]
        else:
            builders = [start(folder, "--engine", "ray", "--set", "processes=2")]
        done = threading.Event()
        slow = threading.Thread(target=slow_down, args=(engine, builders[0].pid, done))
        slow.start()
        if any(builder.wait() for builder in builders):
            raise SystemExit(f"a build ({engine}) failed")
        done.set()
        slow.join()
        commits = [each.stat().st_mtime for each in (folder / "cache" / "commits").rglob("*.json")]
        return max(commits) - min(commits)


def main() -> None:
    """Measure both engines in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for _ in range(options.rounds):
        parts, ray = (seconds(engine, options.seeds) for engine in ("parts", "ray"))
        print(f"parts {parts:.1f} s, handed out {ray:.1f} s, ratio {ray / parts:.2f}")


if __name__ == "__main__":
    main()
