"""Rows of a served cache in plain Python, without kd-cache: numpy, safetensors, google-crc32c.

    python examples/client.py http://127.0.0.1:8000/v1/caches/digits --seed 0 --rows 8
    python examples/client.py http://127.0.0.1:8000/v1/caches/digits --seed 0 --samples 5 17 5

prints which samples came back and what the teacher takes each of them for. A token, where the
service wants one, is taken from the environment: KD_CACHE_TOKEN.
"""

from __future__ import annotations

import argparse
import json
import os
import urllib.error
import urllib.request

import google_crc32c
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

CHECKSUM_HEADER = "kd-cache-crc32c"

Rows = dict[str, NDArray[np.generic]]


def ask(url: str, body: dict[str, object] | None = None) -> tuple[bytes, str | None]:
    """The body of a response, and its checksum header. POSTs where there is something to send."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if token := os.environ.get("KD_CACHE_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"
    content = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data=content, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read(), response.headers[CHECKSUM_HEADER]
    except urllib.error.HTTPError as refused:
        problem = json.load(refused)  # a problem document says what is wrong, and what to do
        raise SystemExit(f"{url}: {problem['detail']} {problem['hint']}") from None
    except urllib.error.URLError as failed:
        raise SystemExit(f"{url}: {failed.reason}") from None


def checked_rows(body: bytes, checksum: str | None, fingerprint: str) -> Rows:
    """The arrays of a response, once its checksum fits and it is of the cache that was opened."""
    found = f"{google_crc32c.value(body):08x}"  # safetensors itself has no checksum
    if found != checksum:
        raise SystemExit(f"the response is damaged: CRC-32C {found}, not {checksum}")
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    if header["__metadata__"]["fingerprint"] != fingerprint:
        raise SystemExit("the response is of another cache than the one that was opened")
    rows: Rows = safetensors.numpy.load(body)
    return rows


def rows_in_order(cache: str, fingerprint: str, *, seed: int, start: int, stop: int) -> Rows:
    """Recorded positions [start, stop) of a seed: what a training epoch reads, in its order.

    The fingerprint in the URL makes the response one that proxies may keep.
    """
    query = f"seed={seed}&start={start}&stop={stop}&fingerprint={fingerprint}"
    return checked_rows(*ask(f"{cache}/rows?{query}"), fingerprint)


def rows_of_samples(cache: str, fingerprint: str, *, seed: int, samples: list[int]) -> Rows:
    """The rows of these samples under a seed, in the requested order."""
    answer = ask(f"{cache}/lookup", {"seed": seed, "samples": samples})
    rows = checked_rows(*answer, fingerprint)
    if rows["sample"].tolist() != samples:
        raise SystemExit("the response has other samples than those requested")
    return rows


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", help="such as http://127.0.0.1:8000/v1/caches/digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=8, help="the first so many of the seed's order")
    parser.add_argument("--samples", type=int, nargs="+", help="these samples instead")
    asked = parser.parse_args()

    manifest = json.loads(ask(asked.cache)[0])
    fingerprint = manifest["fingerprint"]
    print(f"fingerprint {fingerprint}")
    if asked.samples:
        rows = rows_of_samples(asked.cache, fingerprint, seed=asked.seed, samples=asked.samples)
    else:
        rows = rows_in_order(asked.cache, fingerprint, seed=asked.seed, start=0, stop=asked.rows)
    # A dense cache stores logits [row, cell, class]; cell 0 is the whole image.
    classes = rows["logits"][:, 0].argmax(axis=-1)
    for sample, number in zip(rows["sample"].tolist(), classes.tolist(), strict=True):
        print(f"sample {sample}: class {number}")


if __name__ == "__main__":
    main()
