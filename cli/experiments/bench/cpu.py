"""CPU time per request: the service, nginx with a static file of the same bytes, and the constant.

CPU time depends less on other load than throughput does. The servers take turns; each figure is the
median of the rounds. Without nginx, the service is compared with the constant alone.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache_service.errors import KdCacheError

NGINX = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
"""On many systems it is not in the path of ordinary users."""

CONNECTIONS = 8

START_S = 20.0

CONFIG = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 128; }}
http {{
    access_log off;
    sendfile on;
    keepalive_requests 1000000;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port}; root {folder}/files; }}
}}
"""


class Target(NamedTuple):
    """What one server is asked, over and over."""

    pid: int
    port: int
    requests: Sequence[bytes]


class CpuPerRequest(NamedTuple):
    """CPU time of one request, in microseconds, by server; `nginx` is NaN where it is missing."""

    kind: str
    num_bytes: int
    service: float
    constant: float
    nginx: float

    def document(self) -> dict[str, Any]:
        """For `--json`: missing figures are null."""
        return {**self._asdict(), "nginx": None if math.isnan(self.nginx) else self.nginx}


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_per_request(
    load: Callable[[int, Sequence[bytes], int, int], Any],
    targets: Sequence[Target | None],
    *,
    requests: int,
    rounds: int,
) -> list[float]:
    """Microseconds of CPU per request of each target, in turns; NaN for None."""
    found: list[list[float]] = [[] for _ in targets]
    for each in filter(None, targets):  # warm
        load(each.port, each.requests, CONNECTIONS, 4 * len(each.requests))
    for _ in range(rounds):
        for target, taken in zip(targets, found, strict=True):
            if target is None:
                continue
            before = cpu_seconds(target.pid)
            load(target.port, target.requests, CONNECTIONS, requests)
            taken.append((cpu_seconds(target.pid) - before) / requests * 1e6)
    return [statistics.median(taken) if taken else float("nan") for taken in found]


@contextlib.contextmanager
def static_files(folder: Path, sizes: Sequence[int]) -> Iterator[tuple[int, int] | None]:
    """nginx with a file of each size at /0, /1, ...: its process and port. None without nginx.

    Raises:
        KdCacheError: nginx does not start.
    """
    if NGINX is None:
        yield None
        return
    files, config = folder / "files", folder / "nginx.conf"
    files.mkdir()
    for number, size in enumerate(sizes):
        (files / str(number)).write_bytes(os.urandom(size))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    config.write_text(CONFIG.format(folder=folder, port=port))
    command = [NGINX, "-c", str(config), "-e", str(folder / "nginx.log")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)  # noqa: S603  no shell
    try:
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if process.poll() is not None or time.monotonic() > end:
                raise KdCacheError(f"nginx did not start: {(folder / 'nginx.log').read_text()}")
            time.sleep(0.05)
        yield process.pid, port
    finally:
        process.terminate()
        process.wait(10)
