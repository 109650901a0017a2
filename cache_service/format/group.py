"""The root document of a cache: its spec, sealed, in the attributes of a Zarr group. No I/O."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cache_service.errors import CorruptError, NotACacheError
from cache_service.format.canonical import canonical_json, crc32c
from cache_service.format.layout import CacheLayout, group_document
from cache_service.format.spec import FORMAT_VERSION, CacheSpec

ROOT_KEY = "zarr.json"


@dataclass(frozen=True)
class Group:
    """The content of the root document.

    Attributes:
        spec: identity of the cache.
        versions: library name -> version that made the cache, for those that can move a pixel.
        provenance: the `dataset` and `teacher` sections of the latest build, so that `verify
            --recompute` can open them again, and `files_sha256` of the dataset. Not identity.
        head_crc32c: CRC-32C of each constant array's values; empty unless features are stored.
    """

    spec: CacheSpec
    versions: dict[str, str]
    provenance: dict[str, Any]
    head_crc32c: dict[str, int]

    @cached_property
    def fingerprint(self) -> str:
        """Of the spec."""
        return self.spec.fingerprint

    @cached_property
    def layout(self) -> CacheLayout:
        """The arrays and objects of the cache."""
        return CacheLayout(self.spec)


def encode_group(group: Group, num_seeds: int | None = None) -> bytes:
    """Bytes of the root `zarr.json`.

    With `num_seeds` they hold every other metadata document, too, as Zarr's consolidated metadata.
    The service sends them so, because HTTP has no listing that every Zarr library understands.
    """
    facts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "fingerprint": group.fingerprint,
        "spec": group.spec.model_dump(mode="json"),
        "versions": group.versions,
        "provenance": group.provenance,
        "head_crc32c": group.head_crc32c,
    }
    facts["crc32c"] = crc32c(canonical_json(facts))
    document = group_document({"kd_cache": facts})
    if num_seeds is not None:
        nodes = group.layout.documents(num_seeds).items()
        document["consolidated_metadata"] = {
            "kind": "inline",
            "must_understand": False,
            "metadata": {key.removesuffix("/zarr.json"): json.loads(node) for key, node in nodes},
        }
    return canonical_json(document)


def decode_group(content: bytes, url: str) -> Group:
    """Parse and check the root document.

    Raises:
        NotACacheError: it is not a cache, or one of a newer format.
        CorruptError: it was a cache's, but bytes of it changed.
        ConfigError: reading it would take more memory than a cache may ask for.
    """
    try:
        document = json.loads(content)
        facts = document["attributes"]["kd_cache"]
        if not isinstance(facts, dict):
            raise TypeError("kd_cache")
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        raise NotACacheError(
            f"{url} holds a Zarr group, but not one that kd-cache wrote (or its root document is "
            "damaged).",
            hint="`kd-cache info` takes the folder that a build file names under `cache:`.",
        ) from problem
    if facts.get("format") != FORMAT_VERSION:
        raise NotACacheError(
            f"{url} is a cache of format {facts.get('format')!r}; this version reads format "
            f"{FORMAT_VERSION}.",
            hint="Upgrade kd-cache.",
        )
    try:
        spec = CacheSpec.model_validate(facts["spec"])
        group = Group(spec, facts["versions"], facts["provenance"], facts["head_crc32c"])
        if set(group.head_crc32c) != set(group.layout.heads):
            raise ValueError("head_crc32c")
        if not isinstance(group.versions, dict) or not isinstance(group.provenance, dict):
            raise TypeError("versions, provenance")
        # Encoding works out fingerprint and seal, so equal bytes mean that both are right.
        if encode_group(group, _consolidated_seeds(group, document)) != content:
            raise ValueError("seal")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise CorruptError(
            f"{url}/{ROOT_KEY} is not what was written: its seal does not fit its content.",
            hint="Restore the file, or record the cache anew.",
        ) from problem
    group.layout.check_size()
    return group


def _consolidated_seeds(group: Group, document: dict[str, Any]) -> int | None:
    """Length of the seed axis in consolidated metadata; None if the document has none."""
    if "consolidated_metadata" not in document:
        return None
    return int(document["consolidated_metadata"]["metadata"][group.layout.names[0]]["shape"][0])
