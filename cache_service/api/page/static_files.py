"""The page's own files, read once from the wheel. A request names one of them or gets none."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib import resources
from typing import NamedTuple

MEDIA_TYPES = {
    "icon.svg": "image/svg+xml",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}


class StaticFile(NamedTuple):
    """One file with what HTTP says of it."""

    content: bytes
    media_type: str
    etag: str


@lru_cache(maxsize=16)
def static_file(name: str) -> StaticFile | None:
    """The file of that name; None where the page has no such file."""
    media_type = MEDIA_TYPES.get(name)
    if media_type is None:
        return None
    content = resources.files(__package__).joinpath("static", name).read_bytes()
    return StaticFile(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:16]}"')
