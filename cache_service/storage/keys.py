"""Which strings are keys: relative, and no way out of the root."""

from __future__ import annotations

from cache_service.errors import ConfigError


def check_key(key: str) -> str:
    """The key itself, or ConfigError: an empty, `.` or `..` part, a backslash, NUL, half a letter.

    Held for every storage alike, so that a key which works in a folder works in a bucket.
    """
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\0" in key or "\\" in key:
        raise ConfigError(f"{key!r} is not a key: it must be relative and stay below its root.")
    try:
        key.encode()
    except UnicodeEncodeError as problem:
        raise ConfigError(f"{key!r} is not a key: it is not Unicode text.") from problem
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself, or ConfigError; it is empty, or a key that ends with `/`."""
    if prefix and not prefix.endswith("/"):
        raise ConfigError(f"{prefix!r} is not a prefix: it must end with '/'.")
    if prefix:
        check_key(prefix.removesuffix("/"))
    return prefix
