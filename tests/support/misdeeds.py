"""Answers that no honest server gives: frames that do not fit, and HTTP that is not HTTP."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from cache_service.format.frame import CHECKSUM_HEADER, checksum_of
from support.origin import Reply

Maker = Callable[[Reply, np.random.Generator], Reply | None]


def _frame(reply: Reply) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(reply.body[:8], "little")
    return json.loads(reply.body[8 : 8 + size]), reply.body[8 + size :]


def _sealed(reply: Reply, body: bytes) -> Reply:
    """The reply with another body, of which it says all that is true."""
    reply.body = body
    reply.headers |= {"Content-Length": str(len(body)), CHECKSUM_HEADER: checksum_of(body)}
    return reply


def _framed(reply: Reply, header: Any, values: bytes) -> Reply:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return _sealed(reply, len(text).to_bytes(8, "little") + text + values)


def other_shape(reply: Reply, rng: np.random.Generator) -> Reply:
    header, values = _frame(reply)
    entry = header[str(rng.choice(["sample", "digest", "logits"]))]
    place = int(rng.integers(len(entry["shape"])))
    entry["shape"][place] = int(rng.choice([0, -1, 1, 2**40, entry["shape"][place] + 1]))
    return _framed(reply, header, values)


def other_type(reply: Reply, rng: np.random.Generator) -> Reply:
    header, values = _frame(reply)
    name = str(rng.choice(["sample", "digest", "logits"]))
    header[name]["dtype"] = str(rng.choice(["I64", "BF16", "U16", "F64", "OBJECT", ""]))
    return _framed(reply, header, values)


def other_names(reply: Reply, rng: np.random.Generator) -> Reply:
    header, values = _frame(reply)
    name = str(rng.choice(["sample", "digest", "logits"]))
    header[name + "s"] = header.pop(name)
    return _framed(reply, header, values)


def other_facts(reply: Reply, rng: np.random.Generator) -> Reply:
    header, values = _frame(reply)
    key = str(rng.choice(sorted(header["__metadata__"])))
    header["__metadata__"][key] = str(rng.choice(["7", "", "0" * 64, "-1"]))
    return _framed(reply, header, values)


def other_samples(reply: Reply, rng: np.random.Generator) -> Reply:
    header, values = _frame(reply)
    start, end = header["sample"]["data_offsets"]
    samples = np.frombuffer(values[start:end], "<i4").copy()
    if rng.random() < 0.5:
        samples = np.roll(samples, int(rng.integers(1, len(samples))))
    else:
        samples[rng.integers(len(samples))] += 1 + int(rng.integers(2**31 - 1))
    return _framed(reply, header, values[:start] + samples.tobytes() + values[end:])


def no_numbers(reply: Reply, rng: np.random.Generator) -> Reply:
    header, values = _frame(reply)
    start, end = header["logits"]["data_offsets"]
    logits = np.frombuffer(values[start:end], "<f2").copy()
    logits[rng.integers(len(logits))] = rng.choice([np.nan, np.inf, -np.inf])
    return _framed(reply, header, values[:start] + logits.tobytes() + values[end:])


def short_body(reply: Reply, rng: np.random.Generator) -> Reply:
    return _sealed(reply, reply.body[: int(rng.integers(len(reply.body)))])


def long_body(reply: Reply, rng: np.random.Generator) -> Reply:
    return _sealed(reply, reply.body + bytes(int(rng.integers(1, 5000))))


def broken_off(reply: Reply, rng: np.random.Generator) -> Reply:
    reply.body = reply.body[: int(rng.integers(len(reply.body)))]  # the length stays as stated
    reply.raw = _plain(reply)
    return reply


def flipped(reply: Reply, rng: np.random.Generator) -> Reply:
    body = bytearray(reply.body)
    body[rng.integers(len(body))] ^= 1 << int(rng.integers(8))
    reply.body = bytes(body)
    return reply


def no_checksum(reply: Reply, rng: np.random.Generator) -> Reply:
    if rng.random() < 0.5:
        del reply.headers[CHECKSUM_HEADER]
    else:
        reply.headers[CHECKSUM_HEADER] = str(rng.choice(["", "0", "00000000", "zz", "-1"]))
    return reply


def compressed(reply: Reply, rng: np.random.Generator) -> Reply:
    bomb = gzip.compress(bytes(int(rng.integers(1, 8)) << 20))
    reply.headers["Content-Encoding"] = str(rng.choice(["gzip", "deflate", "br", "zstd", "x"]))
    return _sealed(reply, bomb if rng.random() < 0.5 else gzip.compress(reply.body))


def other_length(reply: Reply, rng: np.random.Generator) -> Reply:
    lengths = ["-1", "", "1e3", "0x10", "9" * 30, "10, 11", str(2**62), "+5", " ", "\u0661"]
    chosen = str(rng.choice(lengths)).encode("utf-8").decode("latin-1")
    reply.headers["Content-Length"] = chosen
    reply.raw = _plain(reply)
    return reply


def chunked(reply: Reply, rng: np.random.Generator) -> Reply:
    del reply.headers["Content-Length"]
    reply.headers["Transfer-Encoding"] = str(rng.choice(["chunked", "gzip, chunked", "x"]))
    wrong = len(reply.body) + int(rng.choice([-2, 7]))
    size = b"%x\r\n" % wrong if rng.random() < 0.5 else b"f" * 5000
    reply.body = size + reply.body + b"\r\n0\r\n\r\n"
    reply.raw = _plain(reply)
    return reply


def other_status(reply: Reply, rng: np.random.Generator) -> Reply:
    reply.status = int(
        rng.choice([201, 203, 204, 205, 206, 300, 301, 302, 303, 304, 307, 308, 400])
    )
    if reply.status < 300:
        return _sealed(reply, b"")
    reply.headers["Location"] = "http://127.0.0.1:1/elsewhere"
    return reply


def huge_headers(reply: Reply, rng: np.random.Generator) -> Reply:
    if rng.random() < 0.5:
        reply.headers |= {f"X-{i}": "x" for i in range(int(rng.integers(100, 300)))}
    else:
        reply.headers["X"] = "x" * int(rng.integers(70_000, 300_000))
    return reply


def garbage(reply: Reply, rng: np.random.Generator) -> Reply:
    reply.raw = [rng.bytes(int(rng.integers(1, 3000)))]
    return reply


def no_status(reply: Reply, rng: np.random.Generator) -> Reply:
    lines = [
        "HTTP/1.1",
        "HTTP/9.9 200 OK",
        "HTTP/1.1 twohundred",
        "HTTP/1.1 99999 x",
        "ICY 200",
        "",
    ]
    reply.raw = [str(rng.choice(lines)).encode() + b"\r\n\r\n", reply.body]
    return reply


def gone(_reply: Reply, _rng: np.random.Generator) -> None:
    return None


def _plain(reply: Reply) -> Iterator[bytes]:
    lines = [f"HTTP/1.1 {reply.status} OK", *(f"{k}: {v}" for k, v in reply.headers.items())]
    yield "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + reply.body


MISDEEDS: tuple[Maker, ...] = (
    other_shape, other_type, other_names, other_facts, other_samples, no_numbers, short_body,
    long_body, broken_off, flipped, no_checksum, compressed, other_length, chunked, other_status,
    huge_headers, garbage, no_status, gone,
)  # fmt: skip
