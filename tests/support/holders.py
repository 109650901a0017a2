"""What other processes do to a folder: hold reservations, die half-way, run out of room."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from multiprocessing.connection import Connection

from cache_service.errors import KdCacheError
from cache_service.storage.local import LocalStorage


def start(target: object, *args: object) -> tuple[multiprocessing.Process, Connection]:
    """Run `target(connection, *args)` in a fresh process."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args), daemon=False)
    process.start()
    theirs.close()
    return process, ours


def hold(said: Connection, root: str, name: str) -> None:
    """Reserve, say so, and wait to be killed."""
    said.send(LocalStorage(root).begin(name))
    time.sleep(600)


def hold_with_a_worker(said: Connection, root: str, name: str) -> None:
    """The same with a forked worker, which lives on when its parent is killed."""
    reserved = LocalStorage(root).begin(name)
    born, tell = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(tell, b"1")  # after the fork hooks, which is when it can hold no lock any more
        time.sleep(600)
    os.read(born, 1)
    said.send((reserved, worker))
    time.sleep(600)


def die(*_arguments: object) -> None:
    """Be killed at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_while_writing(said: Connection, root: str, key: str) -> None:
    """Be killed when the temporary file is written but not yet the object."""
    storage = LocalStorage(root)
    storage.put(key, b"whole")
    os.fsync = lambda _handle: os.kill(os.getpid(), signal.SIGKILL)
    said.send(os.getpid())
    storage.put(key, b"half-written")


def write_slowly(said: Connection, root: str, key: str) -> None:
    """Tell when the temporary file is written, then wait for a word before it becomes the object.

    It has the name that a process of another container gives it: same host name, another number.
    """
    storage = LocalStorage(root)
    number, fsync = os.getpid(), os.fsync

    def slow(handle: int) -> None:
        os.fsync = fsync
        fsync(handle)
        said.send("written")
        said.recv()

    # The largest process number there can be: nobody here has it.
    os.getpid, os.fsync = lambda: 1 << 22, slow
    try:
        storage.put(key, b"rows")
    finally:
        os.getpid = lambda: number
    said.send("put")


def write_under_a_size_limit(said: Connection, root: str, limit: int) -> None:
    """Write under RLIMIT_FSIZE what is too long, then lift the limit and write it again."""
    storage = LocalStorage(root)
    storage.put("before", b"good")
    ceiling = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, ceiling))
    refusals = []
    for write in (storage.put, storage.create):
        try:
            write("rows", bytes(2 * limit))
        except KdCacheError as refusal:
            refusals.append(refusal)
    left = sorted(os.listdir(os.path.join(root, ".scratch")))  # noqa: PTH118, PTH208
    resource.setrlimit(resource.RLIMIT_FSIZE, (ceiling, ceiling))
    storage.put("rows", bytes(2 * limit))
    said.send((refusals, left, storage.list("")))
