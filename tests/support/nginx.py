"""nginx before a service, where it is installed."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

NGINX = shutil.which("nginx") or ("/usr/sbin/nginx" if shutil.which("/usr/sbin/nginx") else None)

MAIN = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{block}
}}
"""


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@contextlib.contextmanager
def nginx(folder: Path, block: str, port: int) -> Iterator[None]:
    """Run nginx with a configuration inside `http {}`, until it listens on the port."""
    file, errors = folder / "nginx.conf", folder / "error.log"
    file.write_text(MAIN.format(folder=folder, block=block))
    with running([str(NGINX), "-c", str(file), "-e", str(errors)], port, errors):
        yield


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """Run a proxy, which listens on the port; stopped at the end."""
    process = subprocess.Popen(command)
    try:
        until = time.monotonic() + 20
        while time.monotonic() < until:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)
