"""Where a server is and with what token it is asked: a checked URL, and a secret that stays secret.

The token comes from the environment when a request is made. It is in no URL, file, pickle, log or
message.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from cache_service.errors import ConfigError

TOKEN_VARIABLE = "KD_CACHE_TOKEN"  # noqa: S105  the name of a variable, not a token
TOKEN_FILE_VARIABLE = "KD_CACHE_TOKEN_FILE"  # noqa: S105  as above

_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{1,1024}")
"""What RFC 6750 allows in a bearer token: no space and no line break, so no second header."""

_HOST = re.compile(r"[A-Za-z0-9._:%-]+")
_PORTS = {"http": 80, "https": 443}


class Address(NamedTuple):
    """A checked URL. `path` starts with `/` and does not end with one, or is empty."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        """The URL in one spelling, safe to print."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.path}"


def parse_address(url: str) -> Address:
    """Parse the URL of a cache on a server.

    Raises:
        ConfigError: not an http or https URL, or one with a password, a query or a fragment. What
            could be secret in it is not repeated.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as problem:
        raise ConfigError("that is not a URL: its host or port cannot be read.") from problem
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            "the URL of a cache holds a user name or a password, which would end up in logs.",
            hint=f"Leave it out and put the token into the environment as {TOKEN_VARIABLE}.",
        )
    host = parts.hostname or ""
    # urlsplit drops line breaks and tabs; a URL with one is refused, not repaired.
    readable = url.isascii() and url.isprintable() and " " not in url and "\\" not in url
    if not readable or parts.scheme not in _PORTS or not _HOST.fullmatch(host):
        raise ConfigError(
            f"{_shown(parts)} is not the URL of a server.",
            hint="Write http(s)://HOST[:PORT]/v1/caches/NAME.",
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise ConfigError(
            f"the URL of the cache at {_shown(parts)} goes on with a query or a fragment.",
            hint="Write http(s)://HOST[:PORT]/v1/caches/NAME, and nothing after it.",
        )
    return Address(parts.scheme, host, port or _PORTS[parts.scheme], parts.path.rstrip("/"))


def read_token() -> str | None:
    """The token in the environment, or in the file that the environment names; None without one.

    Raises:
        ConfigError: the file cannot be read, or what is there is no token.
    """
    where, token = TOKEN_VARIABLE, os.environ.get(TOKEN_VARIABLE)
    if not token:
        path = os.environ.get(TOKEN_FILE_VARIABLE)
        if not path:
            return None
        where = f"the file that {TOKEN_FILE_VARIABLE} names"
        try:
            with open(path, encoding="ascii") as file:  # noqa: PTH123  a variable's raw value
                token = file.read(4096).strip()
        except (OSError, ValueError) as problem:
            raise ConfigError(f"{where} cannot be read ({type(problem).__name__}).") from None
    if not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{where} does not hold a token: it has {len(token)} characters, not all of which a "
            "token may have.",
            hint="Put in the one line that `kd-cache token` printed.",
        )
    return token


def _shown(parts: SplitResult) -> str:
    host = "".join(c for c in parts.hostname or "" if c.isprintable())
    return f"{parts.scheme or 'URL'}://{host}"
