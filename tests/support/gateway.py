"""A real S3 server on loopback for the length of a test run: Ceph's object gateway, in a folder.

One monitor, one object store in memory and one gateway, as this user, on free ports. Everything is
found again through the folder, so that a test in another process can kill the gateway and start it
again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from support.sockets import free_port

PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
INSTALL = "apt-get install --no-install-recommends radosgw ceph-mon ceph-osd"

START_S = 120.0
"""Longest wait for a part of the server, which starts in seconds on a free core."""

STOP_S = 10.0

MEMORY_BYTES = 2 << 30
"""Most that the tests may store."""

_CONFIG = """\
[global]
fsid = {fsid}
mon initial members = a
mon host = [v1:127.0.0.1:{mon_port}]
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
ms bind msgr2 = false
mon allow pool size one = true
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd crush chooseleaf type = 0
osd objectstore = memstore
memstore device bytes = {memory}
mon data = {folder}/mon
osd data = {folder}/osd
run dir = {folder}/run
admin socket = {folder}/run/$name.asok
log file = {folder}/$name.log
[client.rgw]
rgw data = {folder}/run
rgw frontends = beast endpoint=127.0.0.1:{port}
"""


class Gateway:
    """The server of one folder, running or not."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._config = self.folder / "ceph.conf"

    @staticmethod
    def missing() -> list[str]:
        """Programs that have to be installed first."""
        return [name for name in PROGRAMS if shutil.which(name) is None]

    @property
    def url(self) -> str:
        """The endpoint."""
        port = json.loads((self.folder / "facts.json").read_text())["port"]
        return f"http://127.0.0.1:{port}"

    def start(self, key: str, secret: str) -> None:
        """Make the store in the folder, and start everything with one user."""
        facts = {"fsid": str(uuid.uuid4()), "mon_port": free_port(), "port": free_port()}
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("mon", "osd", "run"):
            (self.folder / name).mkdir()
        (self.folder / "facts.json").write_text(json.dumps(facts))
        filled = _CONFIG.format(folder=self.folder, memory=MEMORY_BYTES, **facts)
        self._config.write_text(filled)
        self._start_monitor(facts)
        self._start_store()
        self.start_gateway()
        user = ("--uid=tests", "--display-name=tests", f"--access-key={key}", f"--secret={secret}")
        self._run("radosgw-admin", "-n", "client.rgw", "user", "create", *user)

    def start_gateway(self) -> None:
        """Start the gateway, also after `kill_gateway`."""
        self._launch("radosgw", "-f", "-n", "client.rgw")
        _wait(self._answers, "the gateway does not answer", self.folder)

    def kill_gateway(self) -> None:
        """End the gateway as a power cut would."""
        self._end("radosgw", signal.SIGKILL)

    def stop(self) -> None:
        """End every process."""
        for name in ("radosgw", "ceph-osd", "ceph-mon"):
            self._end(name, signal.SIGTERM)

    def _start_monitor(self, facts: dict[str, Any]) -> None:
        monitors = self.folder / "monmap"
        address = f"[v1:127.0.0.1:{facts['mon_port']}]"
        create = ("--create", "--addv", "a", address, "--fsid", facts["fsid"], str(monitors))
        subprocess.run(["monmaptool", *create], check=True, capture_output=True)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", str(monitors))
        self._launch("ceph-mon", "-f", "-i", "a")
        _wait(
            lambda: self._try("ceph", "--connect-timeout", "3", "mon", "stat"),
            "the monitor does not answer",
            self.folder,
        )

    def _start_store(self) -> None:
        number = str(uuid.uuid4())
        self._run("ceph", "osd", "new", number, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", number)
        self._run("ceph", "osd", "crush", "add", "osd.0", "1.0", "host=here", "root=default")
        deadline = time.monotonic() + START_S
        while True:
            self._launch("ceph-osd", "-f", "-i", "0")
            with suppress(TimeoutError):
                _wait(self._is_up, "the store does not come up", self.folder, seconds=20.0)
                return
            # Its first start may read an old map and wait for ever: the next one does not.
            self._end("ceph-osd", signal.SIGKILL)
            if time.monotonic() > deadline:
                raise TimeoutError(f"the store does not come up; see {self.folder}/osd.0.log")

    def _is_up(self) -> bool:
        said = self._try("ceph", "--connect-timeout", "3", "osd", "stat", "-f", "json")
        return bool(said) and json.loads(said)["num_up_osds"] == 1

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(self.url, timeout=3).close()
        except HTTPError:
            return True
        except OSError:
            return False
        return True

    def _command(self, program: str, *arguments: str) -> list[str]:
        return [program, "-c", str(self._config), *arguments]

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            self._command(program, *arguments),
            check=False,
            capture_output=True,
            text=True,
            timeout=START_S,
        )
        if done.returncode:
            raise RuntimeError(f"{program} {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
        return done.stdout

    def _try(self, program: str, *arguments: str) -> str:
        try:
            return self._run(program, *arguments)
        except (RuntimeError, subprocess.TimeoutExpired):
            return ""

    def _launch(self, program: str, *arguments: str) -> None:
        log = (1, str(self.folder / f"{program}.out"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        # It outlives this process's objects, and Ctrl-C on the terminal is for the tests only.
        process = os.posix_spawnp(
            program,
            self._command(program, *arguments),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, *log, 0o600), (os.POSIX_SPAWN_DUP2, 1, 2)],
            setsid=True,
        )
        (self.folder / f"{program}.pid").write_text(str(process))

    def _end(self, program: str, number: int) -> None:
        """End a process that this or another process launched from the folder."""
        note = self.folder / f"{program}.pid"
        if not note.exists():
            return
        process = int(note.read_text())
        with suppress(ProcessLookupError):
            os.kill(process, number)
            deadline = time.monotonic() + STOP_S
            while _is_alive(process):
                if time.monotonic() > deadline:
                    os.kill(process, signal.SIGKILL)
                time.sleep(0.05)
        note.unlink()


def _is_alive(process: int) -> bool:
    with suppress(ChildProcessError):
        os.waitpid(process, os.WNOHANG)
    try:
        os.kill(process, 0)
        # A child of another process stays a zombie until that one looks.
        return ") Z " not in Path(f"/proc/{process}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def _wait(ready: Callable[[], Any], what: str, folder: Path, *, seconds: float = START_S) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}; see the logs in {folder}")
        time.sleep(0.2)


@contextmanager
def gateway(folder: str | Path, key: str, secret: str) -> Iterator[Gateway]:
    """A running server, whose processes end with the block."""
    server = Gateway(folder)
    try:
        server.start(key, secret)
        yield server
    finally:
        server.stop()
