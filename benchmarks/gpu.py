"""Everything that wants a GPU, in one command, without a network.

Parts, in this order: the tests marked `gpu`; `kd-cache bench` step, memory, build and total; and a
shortened `kd-cache reproduce sdd-cifar100`. Each part is a process of its own with a limit of time
and writes its page to --out as soon as it ends, so that a part that fails costs only itself.

    python benchmarks/gpu.py --out docs/results/gpu --data data/cifar100
    python benchmarks/gpu.py --out /tmp/gpu --device cpu --quick --parts step memory build total
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

BENCHMARKS = ("step", "memory", "build", "total")

LIMITS_S = {"tests": 150, "step": 150, "memory": 150, "build": 120, "total": 120, "reproduce": 3600}
"""Seconds after which a part is ended."""

KD_CACHE = (sys.executable, "-c", "from cli.main import run; run()")


def main() -> int:
    """Run the parts. Returns how many failed."""
    options = _options()
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for part in options.parts:
        began = time.monotonic()
        status = _run(_command(part, options, out), out / f"{part}.log", LIMITS_S[part])
        seconds = time.monotonic() - began
        _say(f"{part}: {'done' if status == 0 else f'failed with {status}'} in {seconds:.0f} s")
        failed += status != 0
    return failed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", required=True, help="folder of the pages and logs")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: whether it works")
    parser.add_argument("--data", default="data/cifar100", help="CIFAR-100, for reproduce")
    parser.add_argument("--epochs", type=int, default=30, help="of every network of reproduce")
    parser.add_argument("--seeds", type=int, default=10, help="recorded epochs of reproduce")
    parser.add_argument("--work", default="gpu-work", help="folder of reproduce's runs")
    return parser.parse_args()


def _command(part: str, options: argparse.Namespace, out: Path) -> list[str]:
    if part == "tests":
        tests = ["-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
        return [sys.executable, "-m", "pytest", *tests]
    if part in BENCHMARKS:
        quick = ["--quick"] if options.quick else []
        return [*KD_CACHE, "bench", part, "--device", options.device, "--out", str(out), *quick]
    runs = [f"--{name}={getattr(options, name)}" for name in ("data", "epochs", "seeds", "work")]
    script = str(ROOT / "benchmarks" / "short_sdd.py")
    return [sys.executable, script, f"--out={out}", f"--device={options.device}", *runs]


def _run(command: list[str], log: Path, limit_s: float) -> int:
    """Run a part with its output in a file, and print the end of it if the part fails."""
    environment = os.environ | {"PYTHONPATH": _python_path(), "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            status = -1
    if status != 0:
        _say(log.read_text()[-3000:])
    return status


def _python_path() -> str:
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return os.pathsep.join(filter(None, paths))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
