"""A Ray cluster on this machine, builds on it, and the death of their processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from support.builds import build_document, write_file
from support.sockets import free_port


class Head(NamedTuple):
    """Where a cluster listens, and the process above all of its processes."""

    address: str
    pid: int


OPEN = {"RAY_AUTH_MODE": "disabled"}
"""A cluster that anybody may join, on loopback."""


@contextmanager
def running_head(folder: Path, environment: dict[str, str] | None = None) -> Iterator[Head]:
    """A cluster with three CPUs that runs in a folder, by default in this environment."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    port = free_port()
    options = ["--head", "--block", f"--port={port}", "--num-cpus=3", "--include-dashboard=false"]
    ray = str(Path(sys.executable).parent / "ray")
    head = subprocess.Popen(
        [ray, "start", *options, "--disable-usage-stats", "--node-ip-address=127.0.0.1"],
        cwd=folder,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | OPEN if environment is None else environment,
    )
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield Head(f"127.0.0.1:{port}", head.pid)
    finally:
        above = psutil.Process(head.pid)
        for process in [*above.children(recursive=True), above]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(30)


def start(folder, cluster, *, before=(), environment=OPEN, **changes):
    """`kd-cache build --engine ray` in a folder, with a relative cache; a command may run it.

    Without a cluster it starts its own. `environment` adds to that of this process.
    """
    file = write_file(folder / "build.yaml", build_document("cache", **changes))
    code = "from cli.main import run; run()"
    where = [] if cluster is None else ["--address", cluster.address]
    return subprocess.Popen(
        [
            *before,
            sys.executable,
            "-c",
            code,
            "build",
            file.name,
            "--engine",
            "ray",
            *where,
            "--json",
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def finish(process, seconds):
    """Output, messages and exit status."""
    out, err = process.communicate(timeout=seconds)
    assert "Traceback" not in err
    return out, err, process.returncode


def recorders(pid, title="ray::Recorder"):
    """Processes of actors that record, below the head of a cluster or a command with its own."""
    found = []
    for each in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error, IndexError):
            if each.cmdline()[0].startswith(title):
                found.append(each)
    return found


def wait_for(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def kill_between_commits(cluster, folder, times):
    """Kill one recording process after another, each after a further shard was committed."""
    commits = folder / "cache" / "commits"
    before = len(list(commits.glob("*/*.json")))
    for number in range(times):
        wait_for(lambda n=number: len(list(commits.glob("*/*.json"))) > before + n)
        victims = wait_for(lambda: recorders(cluster.pid))
        victims[number % len(victims)].kill()
