"""Proxies in front of a service, where they are installed: nginx and Caddy, with TLS."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NGINX = shutil.which("nginx") or ("/usr/sbin/nginx" if shutil.which("/usr/sbin/nginx") else None)
CADDY = shutil.which("caddy")
OPENSSL = shutil.which("openssl")

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


def self_signed(folder: Path) -> None:
    """Write `key.pem` and `cert.pem` for localhost, which clients trust if they are told to."""
    files = ("-keyout", folder / "key.pem", "-out", folder / "cert.pem")
    names = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost")
    made = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1")
    subprocess.run([*made, *names, *files], check=True, capture_output=True)


def adapted(block: str, changes: dict[str, str]) -> str:
    """A configuration of a page with other words in it, each of which it must have once."""
    for before, after in changes.items():
        assert block.count(before) == 1, before
        block = block.replace(before, after)
    return block


@contextlib.contextmanager
def nginx(folder: Path, block: str, port: int) -> Iterator[None]:
    """Run nginx with a configuration inside `http {}`, until it listens on the port."""
    file, errors = folder / "nginx.conf", folder / "error.log"
    file.write_text(MAIN.format(folder=folder, block=block))
    with running([str(NGINX), "-c", str(file), "-e", str(errors)], port, errors):
        yield


@contextlib.contextmanager
def caddy(folder: Path, config: str, port: int) -> Iterator[None]:
    """Run Caddy with a Caddyfile, until it listens on the port. Nothing is left in the home."""
    file, errors = folder / "Caddyfile", folder / "error.log"
    file.write_text(config)
    home = {"HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    command = [str(CADDY), "run", "--config", str(file), "--adapter", "caddyfile"]
    with errors.open("w") as log, running(command, port, errors, stderr=log, env=home):
        yield


@contextlib.contextmanager
def running(command: list[str], port: int, log: Path, **options: Any) -> Iterator[None]:
    """Run a proxy, which listens on the port; stopped at the end."""
    process = subprocess.Popen(command, **options)
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
