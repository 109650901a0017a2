"""Ports, clients that behave badly (raw sockets), and a probe that asks for health meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import re
import select
import socket
import threading
import time
from collections.abc import Iterator


def free_port() -> int:
    """A port of this machine on which nothing listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One GET on a connection of its own: status, headers in lower case, body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        named = {name.lower(): value for name, value in response.getheaders()}
        return response.status, named, response.read()
    finally:
        connection.close()


def metric(port: int, name: str) -> float:
    """The value of one series of /metrics, by its name with labels; 0 where it is not there."""
    for line in get(port, "/metrics")[2].decode().splitlines():
        if line.rpartition(" ")[0] == name:
            return float(line.rpartition(" ")[2])
    return 0.0


def receive_all(opened: socket.socket) -> bytes:
    """What comes until the other side closes; a reset is an end, too."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := opened.recv(65536):
            received += piece
    return received


def receive_one(opened: socket.socket) -> bytes:
    """One answer with a content-length, whole: headers and body come in segments of their own."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += opened.recv(1) or b"\r\n\r\n"
    length = re.search(rb"content-length: (\d+)", received)
    left = int(length[1]) if length else 0
    while left and (piece := opened.recv(left)):
        received, left = received + piece, left - len(piece)
    return received


class Closings:
    """When the server closed each of many sockets, in seconds since `begun`."""

    def __init__(self, sockets: list[socket.socket], begun: float) -> None:
        self.open = {each.fileno(): each for each in sockets}
        self.begun = begun
        self.seconds: list[float] = []
        self._poll = select.poll()
        for number in self.open:
            self._poll.register(number, select.POLLIN)

    def wait(self, seconds: float) -> None:
        """Note closings for so long, or until none is open."""
        until = time.monotonic() + seconds
        while self.open and (left := until - time.monotonic()) > 0:
            for number, _ in self._poll.poll(left * 1000):
                self._note(number)

    def _note(self, number: int) -> None:
        try:
            closed = not self.open[number].recv(65536)
        except OSError:
            closed = True
        if closed:
            self.seconds.append(time.monotonic() - self.begun)
            self._poll.unregister(number)
            self.open.pop(number).close()


class Probe:
    """How long /healthz took, asked for on a new connection every 50 ms."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seconds: list[float] = []
        self.failures: list[str] = []

    def ask(self) -> None:
        begun = time.perf_counter()
        try:
            status = get(self.port, "/healthz")[0]
        except OSError as failure:
            self.failures.append(repr(failure))
            return
        self.seconds.append(time.perf_counter() - begun)
        if status != 200:
            self.failures.append(str(status))


@contextlib.contextmanager
def probing(port: int) -> Iterator[Probe]:
    probe, ended = Probe(port), threading.Event()

    def ask_on() -> None:
        while not ended.wait(0.05):
            probe.ask()

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        yield probe
    finally:
        ended.set()
        thread.join()
