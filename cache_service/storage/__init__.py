"""Where the bytes are: one interface over a folder, an S3 bucket and (reading) an HTTP server.

The only place that looks at a URL's scheme. Every write is of a whole object, atomic, and durable
when the call returns; `create` makes an object only where there is none. Nothing here knows what
the bytes mean.
"""

from __future__ import annotations

import re
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError

_SERVER = re.compile(r"[^/]+:\d+/v1/caches/")
"""A host, a port and the service's path: a URL whose `http://` was left out, and no folder."""


class Storage(Protocol):
    """Whole objects by key. Keys are relative, with `/` between parts."""

    url: str

    def get(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        ...

    def get_ranges(self, key: str, ranges: list[tuple[int, int]]) -> list[bytes] | None:
        """Bytes [start, stop) of one object for each range, or None where there is no object.

        Ranges are not empty. One that runs over the object's end comes back short, so the caller
        checks lengths; one that begins there comes back empty or is a StorageError.
        """
        ...

    def size(self, key: str) -> int | None:
        """Bytes of the object, or None where there is none."""
        ...

    def put(self, key: str, content: bytes) -> None:
        """Write the object, replacing one that is there."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Write the object unless there is one. False means that somebody else was first."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Keys below the prefix (which ends with `/` or is empty), sorted."""
        ...

    def map(self, key: str) -> NDArray[np.uint8] | None:
        """The object as a read-only memory map; None where it is absent or cannot be mapped."""
        ...

    def begin(self, name: str) -> bool:
        """Reserve a piece of work among builders of this storage; False: somebody else has it.

        A reservation ends with the process that holds it, also by kill -9. Storages without such a
        thing answer True: work done twice is wasted, never wrong.
        """
        ...

    def end(self, name: str) -> None:
        """Give a reservation back."""
        ...

    def sweep(self) -> None:
        """Remove what interrupted writers left behind."""
        ...


def open_storage(url: str) -> Storage:
    """The storage behind a path, `file://`, `s3://`, `http://` or `https://` URL.

    Raises:
        ConfigError: an unknown scheme, or the extra that it needs is not installed.
    """
    scheme, found, rest = url.partition("://")
    if not found:
        if _SERVER.match(url):
            raise ConfigError(
                f"cannot open {url}: that is the address of a server, without its scheme.",
                hint=f"Write http://{url}",
            )
        return _local(url)
    if scheme == "file":
        return _local(rest)
    if scheme in ("s3", "gs", "az"):
        return _object_store(url)
    if scheme in ("http", "https"):
        return _server(url)
    raise ConfigError(
        f"cannot open {url}: the scheme {scheme!r} is not known.",
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
