"""Caches as earlier versions wrote them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache_service.format.group import ROOT_KEY, decode_group, encode_group


def rewrite_provenance(url: str, path: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """A copy of a cache with another provenance, sealed as if it had been written so."""
    shutil.copytree(url, path)
    group = decode_group((path / ROOT_KEY).read_bytes(), url)
    provenance = dict(group.provenance)
    change(provenance)
    (path / ROOT_KEY).write_bytes(encode_group(replace(group, provenance=provenance)))
    return str(path)
