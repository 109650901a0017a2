"""`bench http`: the service against a route that returns a constant, in one run, round by round.

Ranges as long as a trainer asks for, and lookups of 256 random rows, over 1, 8 and 64 connections.
Service and constant take turns, so that whatever else the machine does meets both; the ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache_service.errors import CorruptError
from cache_service.format.frame import (
    CHECKSUM_HEADER,
    decode_frame,
    frame_header,
    lookup_metadata,
    range_metadata,
    values_size,
)
from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec
from cache_service.remote.prefetch import rows_per_request
from cache_service.rows.reader import open_cache
from cli.experiments.bench.processes import KD_CACHE, Load, Memory, Server, serving
from cli.experiments.bench.rows import write_bench_cache

LOOKUP_ROWS = 256
CONCURRENCY = (1, 8, 64)
TARGETS = {"range": 0.70, "lookup": 0.18}
"""Share of the constant's requests a second that the service is to reach."""

DIFFERENT_REQUESTS = 64
"""Of each kind, asked for in turn."""

CACHE = "bench"


class Plan(NamedTuple):
    """How much is measured.

    Attributes:
        num_samples: rows of the cache.
        rounds: turns of service and constant.
        requests: of one turn, by kind; never fewer than there are connections.
    """

    num_samples: int
    rounds: int
    requests: dict[str, int]


FULL = Plan(num_samples=131_072, rounds=5, requests={"range": 140, "lookup": 1200})
"""3 concurrencies * 5 rounds * 1,340: 20,100 requests to the service."""

QUICK = Plan(num_samples=65_536, rounds=3, requests={"range": 16, "lookup": 128})


class Measured(NamedTuple):
    """One kind of request at one concurrency.

    Attributes:
        kind: range or lookup.
        concurrency: connections.
        per_second: requests, of the service.
        constant_per_second: requests, of the constant.
        ratio: median over the rounds.
        p50_ms, p99_ms: latency of the service.
        bytes_per_second: of the service.
    """

    kind: str
    concurrency: int
    per_second: float
    constant_per_second: float
    ratio: float
    p50_ms: float
    p99_ms: float
    bytes_per_second: float


class HttpBench(NamedTuple):
    """Everything that one run found.

    Attributes:
        kinds: rows and bytes of one answer, by kind.
        requests: to the service.
        measured: each kind at each concurrency.
        before, after: memory of the service, warm, and after all requests.
    """

    kinds: dict[str, Kind]
    requests: int
    measured: list[Measured]
    before: Memory
    after: Memory

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        ratios = {kind: self.ratio(kind) for kind in TARGETS}
        return {
            "kinds": {
                name: {"rows": kind.num_rows, "bytes": kind.num_bytes}
                for name, kind in self.kinds.items()
            },
            "requests": self.requests,
            "measured": [each._asdict() for each in self.measured],
            "ratios": ratios,
            "targets": TARGETS,
            "reached": {kind: ratios[kind] >= TARGETS[kind] for kind in TARGETS},
            "memory": {"before": self.before._asdict(), "after": self.after._asdict()},
        }

    def ratio(self, kind: str) -> float:
        """The median over the concurrencies."""
        return statistics.median(each.ratio for each in self.measured if each.kind == kind)


class Kind(NamedTuple):
    """One kind of request: what an answer holds, and what is sent to get one."""

    num_rows: int
    num_bytes: int
    requests: list[bytes]


def run_http_bench(plan: Plan, say: Callable[[str], None]) -> HttpBench:
    """Write a cache, serve it, measure, throw everything away.

    Raises:
        KdCacheError: a server did not start, or answered otherwise than it must.
    """
    with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as name:
        folder = Path(name)
        root = folder / "root"
        root.mkdir()
        say(f"writing {plan.num_samples:,} rows")
        spec = write_bench_cache(str(root / CACHE), plan.num_samples)
        kinds = {"range": _ranges(spec), "lookup": _lookups(spec)}
        service = [*KD_CACHE, "serve", str(root), "--port", "0", "--json"]
        sizes = [str(kind.num_bytes) for kind in kinds.values()]
        constant = [sys.executable, "-m", "cli.experiments.bench.constant", *sizes]
        with (
            serving(service, folder / "service.log") as measured,
            serving(constant, folder / "constant.log") as beside,
            Load() as load,
        ):
            _check_answer(measured, str(root / CACHE), spec)
            return _measure(plan, kinds, load, (measured, beside), say)


def _measure(
    plan: Plan,
    kinds: dict[str, Kind],
    load: Load,
    servers: tuple[Server, Server],
    say: Callable[[str], None],
) -> HttpBench:
    service, constant = servers
    for kind in kinds.values():  # every page mapped, every thread started, before memory is read
        load.measure(
            service.port, kind.requests, concurrency=max(CONCURRENCY), count=2 * DIFFERENT_REQUESTS
        )
    before, count = service.memory(), 0
    found = []
    for number, (name, kind) in enumerate(kinds.items()):
        for clients in CONCURRENCY:
            say(f"{name}s of {kind.num_rows} rows over {clients} connections")
            times = max(plan.requests[name], clients)
            same = [_http("GET", f"/{number}")]
            turns = [
                (
                    load.measure(service.port, kind.requests, concurrency=clients, count=times),
                    load.measure(constant.port, same, concurrency=clients, count=times),
                )
                for _ in range(plan.rounds)
            ]
            found.append(_summary(name, clients, turns))
            count += times * plan.rounds
    return HttpBench(kinds, count, found, before, service.memory())


def _summary(
    kind: str, concurrency: int, turns: list[tuple[dict[str, Any], dict[str, Any]]]
) -> Measured:
    seconds = sum(turn["seconds"] for turn, _ in turns)
    beside = sum(turn["seconds"] for _, turn in turns)
    latencies_ms = 1000 * np.concatenate([turn["latencies"] for turn, _ in turns])
    return Measured(
        kind=kind,
        concurrency=concurrency,
        per_second=len(latencies_ms) / seconds,
        constant_per_second=len(latencies_ms) / beside,
        ratio=statistics.median(b["seconds"] / a["seconds"] for a, b in turns),
        p50_ms=float(np.quantile(latencies_ms, 0.5)),
        p99_ms=float(np.quantile(latencies_ms, 0.99)),
        bytes_per_second=sum(turn["num_bytes"] for turn, _ in turns) / seconds,
    )


def _ranges(spec: CacheSpec) -> Kind:
    """One after the other, each as long as `cache_service.remote` asks for."""
    arrays = CacheLayout(spec).arrays
    total = spec.dataset.num_samples
    rows = min(rows_per_request(arrays), total)
    head = frame_header(arrays, rows, range_metadata(spec.fingerprint, 0, 0, rows))
    starts = [rows * n % (total - rows + 1) for n in range(DIFFERENT_REQUESTS)]
    requests = [_http("GET", _rows_path(start, start + rows)) for start in starts]
    return Kind(rows, len(head) + values_size(arrays, rows), requests)


def _lookups(spec: CacheSpec) -> Kind:
    """Samples drawn at random."""
    arrays = CacheLayout(spec).arrays
    head = frame_header(arrays, LOOKUP_ROWS, lookup_metadata(spec.fingerprint, 0, LOOKUP_ROWS))
    rng = np.random.default_rng(1)
    drawn = [
        rng.integers(0, spec.dataset.num_samples, LOOKUP_ROWS).astype("<i4")
        for _ in range(DIFFERENT_REQUESTS)
    ]
    path = f"/v1/caches/{CACHE}/lookup?seed=0"
    requests = [_http("POST", path, samples.tobytes()) for samples in drawn]
    return Kind(LOOKUP_ROWS, len(head) + values_size(arrays, LOOKUP_ROWS), requests)


def _rows_path(start: int, stop: int) -> str:
    return f"/v1/caches/{CACHE}/rows?seed=0&start={start}&stop={stop}"


def _http(method: str, path: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n"
    if body:
        head += f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


def _check_answer(service: Server, path: str, spec: CacheSpec) -> None:
    """Whether the answers that are timed are right: one range, compared with the cache itself."""
    import urllib3

    url = f"http://127.0.0.1:{service.port}{_rows_path(0, LOOKUP_ROWS)}"
    answer = urllib3.request("GET", url)
    if answer.status != 200:
        raise CorruptError(f"{url} answered {answer.status}: {answer.data[:300]!r}")
    arrays = CacheLayout(spec).arrays
    found = decode_frame(
        answer.data,
        checksum=answer.headers.get(CHECKSUM_HEADER),
        arrays=arrays,
        num_rows=LOOKUP_ROWS,
        metadata=range_metadata(spec.fingerprint, 0, 0, LOOKUP_ROWS),
        what=url,
    )
    stored = open_cache(path).read(0, 0, LOOKUP_ROWS)
    if not all(np.array_equal(found[name], stored[name]) for name in stored):
        raise CorruptError(f"{url} answered other rows than {path} holds.")
