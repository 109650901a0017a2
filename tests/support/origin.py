"""A small server of the HTTP contract for the client's tests: one folder of caches, any misdeed.

Not the service: that one is tested as itself. `python -m support.origin ROOT PORT` for killing.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np

from cache_service.errors import KdCacheError, RowsNotBuiltError
from cache_service.format.frame import (
    CHECKSUM_HEADER,
    MEDIA_TYPE,
    checksum_of,
    frame_header,
    lookup_metadata,
    range_metadata,
)
from cache_service.rows.reader import Cache, open_cache
from support.frames import encode_frame

PROBLEM = "application/problem+json"


class Reply:
    """What will be sent; a misdeed may change any of it."""

    def __init__(self, status: int, body: bytes, kind: str, **headers: str) -> None:
        self.status = status
        self.body = body
        self.raw: Iterable[bytes] | None = None  # instead of all else, piece by piece
        self.headers = {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }


Misdeed = Callable[[str, Reply], Reply | None]
"""(path, honest reply) -> what to send instead; None breaks the connection."""


class Origin(ThreadingHTTPServer):
    """Serves the caches below `root`. `requests` holds (method, target, headers) of each."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, root: Path, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.root = root
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.misdeed: Misdeed = lambda _path, reply: reply
        self.token: str | None = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away in the middle on purpose."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/caches/{name}"

    def targets(self, part: str) -> list[str]:
        return [target for _, target, _ in self.requests if part in target]


@contextmanager
def serving(root: Path) -> Iterator[Origin]:
    """An `Origin` in a thread."""
    with Origin(root) as origin:
        thread = threading.Thread(target=origin.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield origin
        finally:
            origin.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Origin

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_GET

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, self.path, dict(self.headers)))
        try:
            reply = self._answer(body)
        except KdCacheError as refusal:
            status = 503 if getattr(refusal, "later", False) else refusal.http_status
            reply = _problem(status, refusal.code, refusal.message, refusal.hint)
        sent = self.server.misdeed(self.path, reply)
        if sent is None:
            self.close_connection = True
            return
        if sent.raw is not None:
            self.close_connection = True
            for piece in sent.raw:
                self.wfile.write(piece)
                self.wfile.flush()
            return
        self.send_response(sent.status)
        for name, value in sent.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent.body)

    def _answer(self, body: bytes) -> Reply:
        wanted = self.server.token
        if wanted is not None and self.headers.get("Authorization") != f"Bearer {wanted}":
            return _problem(401, "unauthorized", "no token, or another one", "")
        parts = urlsplit(self.path)
        query = dict(parse_qsl(parts.query))
        _, _, _, name, *rest = unquote(parts.path).split("/")
        cache = open_cache(str(self.server.root / name))
        if not rest:
            return _manifest(cache)
        if rest[0] == "zarr":
            return self._object(cache, "/".join(rest[1:]))
        return _rows(cache, rest[0], query, body)

    def _object(self, cache: Cache, key: str) -> Reply:
        content = cache.storage.get(key)
        if content is None:
            return _problem(404, "no_such_key", f"no key {key}", "")
        wanted = self.headers.get("Range")
        if wanted is None:
            return Reply(200, content, "application/octet-stream")
        first, last = map(int, wanted.removeprefix("bytes=").split("-"))
        total = len(content)
        if first >= total:
            reply = _problem(416, "range", "beyond the end", "")
            reply.headers["Content-Range"] = f"bytes */{total}"
            return reply
        part = content[first : last + 1]
        said = f"bytes {first}-{first + len(part) - 1}/{total}"
        return Reply(206, part, "application/octet-stream", Content_Range=said)


def _manifest(cache: Cache) -> Reply:
    document = {
        "name": Path(cache.url).name,
        "fingerprint": cache.fingerprint,
        "num_seeds": cache.num_seeds(),
        "commits": {str(seed): shards for seed, shards in cache.commits().items()},
    }
    return Reply(200, json.dumps(document).encode(), "application/json")


def _rows(cache: Cache, what: str, query: dict[str, str], body: bytes) -> Reply:
    named = query.get("arrays")
    names = tuple(named.split(",")) if named else None
    arrays = [a for a in cache.layout.arrays if names is None or a.name in names]
    seed = int(query["seed"])
    ends = time.monotonic() + float(query.get("wait", 0))
    while True:
        try:
            if what == "rows":
                start, stop = int(query["start"]), int(query["stop"])
                rows = cache.read(seed, start, stop, arrays=names)
                told, count = range_metadata(cache.fingerprint, seed, start, stop), stop - start
            else:
                samples = np.frombuffer(body, "<i4").astype(np.int64)
                rows, count = cache.lookup(seed, samples, arrays=names), len(samples)
                told = lookup_metadata(cache.fingerprint, seed, count)
            break
        except RowsNotBuiltError as refusal:
            if seed >= cache.num_seeds():
                raise
            if time.monotonic() > ends:
                refusal.later = True  # type: ignore[attr-defined]
                raise
            time.sleep(0.02)
    content = encode_frame(arrays, rows, frame_header(arrays, count, told))
    headers = {CHECKSUM_HEADER: checksum_of(content)}
    reply = Reply(200, content, MEDIA_TYPE)
    reply.headers |= headers
    return reply


def _problem(status: int, code: str, detail: str, hint: str) -> Reply:
    document = {
        "type": "about:blank",
        "title": code,
        "status": status,
        "detail": detail,
        "instance": "",
        "code": code,
        "hint": hint,
    }
    reply = Reply(status, json.dumps(document).encode(), PROBLEM)
    if status == 503:
        reply.headers["Retry-After"] = "0"
    return reply


def main() -> None:
    root, port = sys.argv[1:]
    with Origin(Path(root), int(port)) as origin:
        origin.serve_forever()


if __name__ == "__main__":
    main()
