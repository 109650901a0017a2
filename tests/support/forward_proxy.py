"""A forward proxy, as companies put before the internet: whatever is asked for goes to one port."""

from __future__ import annotations

import base64
import http.client
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class ForwardProxy(ThreadingHTTPServer):
    """Forwards absolute URLs and tunnels to `target`. `asked` has the lines of all requests."""

    daemon_threads = True

    def __init__(self, target: int, user: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = target
        self.user = user
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away in the middle on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ForwardProxy

    def log_message(self, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self._refused():
            return
        parts = urlsplit(self.path)
        assert parts.netloc, "not the request of a client that uses a proxy"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        there = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=20)
        headers = {k: v for k, v in self.headers.items() if not k.lower().startswith("proxy-")}
        there.request(self.command, f"{parts.path}?{parts.query}".rstrip("?"), body, headers)
        answer = there.getresponse()
        content = answer.read()
        there.close()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_GET

    def do_CONNECT(self) -> None:
        if self._refused():
            return
        self.send_response(200)
        self.end_headers()
        with socket.create_connection(("127.0.0.1", self.server.target)) as there:
            both = [self.connection, there]
            while True:
                for ready in select.select(both, [], [])[0]:
                    with suppress(OSError):
                        if piece := ready.recv(1 << 16):
                            both[ready is self.connection].sendall(piece)
                            continue
                    self.close_connection = True
                    return

    def _refused(self) -> bool:
        self.server.asked.append(f"{self.command} {self.path}")
        wanted = base64.b64encode(self.server.user.encode()).decode()
        if not self.server.user or self.headers.get("Proxy-Authorization") == f"Basic {wanted}":
            return False
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return True


@contextmanager
def forwarding(target: int, user: str = "") -> Iterator[ForwardProxy]:
    """A `ForwardProxy` in a thread."""
    with ForwardProxy(target, user) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.shutdown()
            thread.join()
