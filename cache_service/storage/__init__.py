"""One interface for whole objects in a folder, in an S3 bucket, and (read-only) on an HTTP server.

This package is the only place that looks at a URL's scheme. Every write replaces a whole object,
is atomic, and is durable when the call returns; `create` writes an object only if there is none.
Nothing here interprets the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError

_SERVER = re.compile(r"[^/]+:\d+/v1/caches/")
"""Host, port and the service's path: a URL without its `http://`, and not a folder."""


class Readable(Protocol):
    """Whole objects by key, to read. Keys are relative, with `/` between parts.

    Attributes:
        url: of the objects.
    """

    url: str

    def get(self, key: str) -> bytes | None:
        """The object, or None if there is none."""
        ...

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) of one object for each range, or None if there is no object.

        Ranges are not empty. A range that extends beyond the object's end is returned short, so the
        caller checks lengths; one that starts there is returned empty or raises StorageError.
        """
        ...

    def size(self, key: str) -> int | None:
        """The size of the object in bytes, or None if there is none."""
        ...

    def map(self, key: str) -> NDArray[np.uint8] | None:
        """The object as a read-only memory map; None if it is absent or cannot be mapped."""
        ...


class Storage(Readable, Protocol):
    """Whole objects by key, to read and to write.

    Attributes:
        has_locks: whether `begin` can exclude other builders. Where each of them has its own mount
            of a folder it does not, and nobody can tell.
    """

    has_locks: bool

    def put(self, key: str, content: bytes) -> None:
        """Writes the object, replacing an existing one."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Writes the object unless it exists. Returns False if it does."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object if it exists."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Keys below the prefix (which ends with `/` or is empty), sorted."""
        ...

    def forget(self, keys: Sequence[str]) -> bool:
        """Removes this machine's copies of these objects, if it keeps any. Whether it did."""
        ...

    def begin(self, name: str) -> bool:
        """Reserves a piece of work among all builders that write here; False if it is taken.

        A reservation ends with the process that holds it, also after kill -9. Storages without
        locks return True: work that is done twice is wasted, never wrong.
        """
        ...

    def end(self, name: str) -> None:
        """Ends a reservation."""
        ...

    def sweep(self) -> None:
        """Removes temporary files that interrupted writers left."""
        ...


def check_key(key: str) -> str:
    """Returns the key if it is valid.

    The rule is the same for every storage, so that a key that works in a folder works in a bucket.

    Raises:
        ConfigError: the key is absolute, has an empty, `.` or `..` part, a backslash, a NUL, or is
            not valid Unicode.
    """
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in key or "\\" in key:
        raise ConfigError(
            f"{key!r} is not a valid key: a key is relative and stays below its root."
        )
    try:
        key.encode()
    except UnicodeEncodeError as problem:
        raise ConfigError(f"{key!r} is not a valid key: it is not Unicode text.") from problem
    return key


def check_prefix(prefix: str) -> str:
    """Returns the prefix if it is valid: empty, or a key followed by `/`. Raises ConfigError."""
    if prefix and not prefix.endswith("/"):
        raise ConfigError(f"{prefix!r} is not a valid prefix: it must end with '/'.")
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix


def is_server_url(url: str) -> bool:
    """Whether this is the URL of a cache on an HTTP server."""
    return url.startswith(("http://", "https://"))


def is_bucket_url(url: str) -> bool:
    """Whether this is the URL of a cache in an object store."""
    return url.startswith(("s3://", "gs://", "az://"))


def is_url(url: str) -> bool:
    """Whether this has a scheme, so that it means the same place on every machine."""
    return "://" in url


def local_path(url: str) -> str | None:
    """The path of a folder of this machine; None for the URL of another place."""
    scheme, found, rest = url.partition("://")
    if not found:
        return url
    return rest if scheme == "file" else None


def open_storage(url: str) -> Storage:
    """Opens the storage at a path or a `file://`, `s3://`, `http://` or `https://` URL.

    Raises:
        ConfigError: the scheme is unknown, or the extra that it needs is not installed.
    """
    scheme, found, _ = url.partition("://")
    if not found and _SERVER.match(url):
        raise ConfigError(
            f"cannot open {url}: that is the address of a server without its scheme.",
            hint=f"Write http://{url}",
        )
    if (path := local_path(url)) is not None:
        return _local(path)
    if is_bucket_url(url):
        return _object_store(url)
    if scheme in ("http", "https"):
        return _server(url)
    raise ConfigError(
        f"cannot open {url}: the scheme {scheme!r} is unknown.",
        hint="Use a path, s3://bucket/prefix, gs://, az:// or http(s)://HOST/v1/caches/NAME.",
    )


def _local(path: str) -> Storage:
    from cache_service.storage.local import LocalStorage

    return LocalStorage(path)


def _object_store(url: str) -> Storage:
    try:
        from cache_service.storage.objects import ObjectStorage
    except ImportError as missing:
        raise ConfigError(
            f"cannot open {url}: obstore is not installed.", hint="pip install 'kd-cache[s3]'"
        ) from missing
    return ObjectStorage(url)


def _server(url: str) -> Storage:
    from cache_service.storage.http import HttpStorage

    return HttpStorage(url)
