"""An S3 server on loopback: moto's, started once per test process, or one that you name.

`KD_CACHE_S3_ENDPOINT` names a real server, which then takes moto's place, too; its credentials are
the usual AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. `make test-s3` starts one.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import multiprocessing
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from support.counted import CountingProxy, counted
from support.sockets import free_port

BUCKET = "kd-cache-tests"
KEY, SECRET = "canary-key", "canary-secret-3141"
"""Credentials of the fake server, and what must never show up in a message or a pickle."""

_START_S = 60.0
"""moto imports for some 3 s on a free core."""


def moto_environment() -> dict[str, str]:
    """What a process needs in its environment to reach moto; skips where moto is not installed."""
    for name in ("moto", "boto3", "obstore"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[test]'")
    if os.environ.get("KD_CACHE_S3_ENDPOINT"):
        return real_environment()
    return _environment(_moto_endpoint(), KEY, SECRET)


def real_environment() -> dict[str, str]:
    """The same for the server named in KD_CACHE_S3_ENDPOINT; skips where none is named."""
    endpoint = os.environ.get("KD_CACHE_S3_ENDPOINT")
    if not endpoint:
        pytest.skip("KD_CACHE_S3_ENDPOINT names no S3 server")
    key, secret = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    _make_bucket(endpoint, key, secret)
    return _environment(endpoint, key, secret)


def new_prefix() -> str:
    """A URL that nobody has written below."""
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@contextmanager
def counted_bucket(patch: pytest.MonkeyPatch, *, latency_s: float = 0.0) -> Iterator[CountingProxy]:
    """A proxy in front of the server in the environment, which then names the proxy instead."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    with counted(urlsplit(endpoint).port or 80, latency_s=latency_s) as proxy:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy
    patch.setenv("AWS_ENDPOINT_URL", endpoint)


def _environment(endpoint: str, key: str, secret: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
        "XDG_CACHE_HOME": _copies(),
    }


@functools.cache
def _copies() -> str:
    """Where readers of a bucket keep its objects by default: not in the home of the tester."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def _moto_endpoint() -> str:
    port = free_port()
    # A process of its own, so that no test ever forks its threads.
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(port,), daemon=True)
    server.start()
    atexit.register(server.kill)
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and server.is_alive():
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    endpoint = f"http://127.0.0.1:{port}"
    _make_bucket(endpoint, KEY, SECRET)
    return endpoint


def _serve(port: int) -> None:
    import logging
    import threading

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import run_simple

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app, one_at_a_time = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def atomic(environ: Any, start_response: Any) -> Any:
        # moto looks whether a key exists and then writes it, in threads: once in some hundred
        # rounds of twelve writers two are told that they created it. S3 itself does not do that.
        with one_at_a_time:
            return app(environ, start_response)

    run_simple("127.0.0.1", port, atomic, threaded=True)


@functools.cache
def _make_bucket(endpoint: str, key: str, secret: str) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=key,
        aws_secret_access_key=secret,
    )
    if BUCKET not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=BUCKET)
    client.close()
