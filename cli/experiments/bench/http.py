"""`bench http`: the service against nginx and a route that returns a constant, round by round.

The service serves a cache of random rows that is thrown away at the end.

Ranges as long as a trainer asks for, and lookups of 256 random rows, over 1, 8 and 64 connections.
Service and constant take turns, so that other load on the machine affects both; the ratio is the
median of the rounds' ratios. CPU time per request is compared with nginx that sends a static file
of the same bytes, where it is installed: ranges of 256 and 64 rows, and raw keys.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import CorruptError, KdCacheError
from cache_service.format.frame import (
    CHECKSUM_HEADER,
    decode_frame,
    frame_header,
    lookup_metadata,
    range_metadata,
    values_size,
)
from cache_service.format.layout import CacheLayout, default_layout
from cache_service.format.recipe import AugmentConfig
from cache_service.format.spec import CacheSpec, DatasetId, Layout, Preprocess, TeacherId
from cache_service.processes import ChildProcess, Message, module_command
from cache_service.remote.prefetch import rows_per_request
from cache_service.rows.reader import open_cache
from cache_service.rows.writer import create_cache
from cache_service.storage import open_storage
from cache_service.views.order import epoch_order
from cli.experiments.bench.cpu import CpuPerRequest, Target, cpu_per_request, static_files

LOG = logging.getLogger(__name__)

Load = Callable[[int, Sequence[bytes], int, int], Message]
"""Port, requests, connections and number of responses to seconds, latencies and bytes."""

LOOKUP_ROWS = 256
CONCURRENCY = (1, 8, 64)
SMALL_ROWS = (256, 64)
"""Ranges whose CPU time is measured: batches of usual sizes."""
TARGETS = {"range": 0.70, "lookup": 0.18}
"""Fraction of the constant's requests a second that the service is to reach."""

DIFFERENT_REQUESTS = 64
"""Of each kind, sent in turn."""

CACHE = "bench"


NUM_CLASSES = 1000
VIEW_SIZE = 8
STOP_S = 10.0

KD_CACHE = (sys.executable, "-c", "from cli.main import run; run()")
"""This installation's own command."""


class Sizes(NamedTuple):
    """How much is measured.

    Attributes:
        num_samples: rows of the cache.
        rounds: turns of service and constant.
        requests: of one turn, by kind; never fewer than there are connections.
        cpu_requests: of one turn of the measurement of CPU time.
    """

    num_samples: int
    rounds: int
    requests: dict[str, int]
    cpu_requests: int


FULL = Sizes(
    num_samples=131_072, rounds=5, requests={"range": 140, "lookup": 1200}, cpu_requests=2000
)
"""3 concurrencies * 5 rounds * 1,340: 20,100 requests to the service."""

QUICK = Sizes(num_samples=65_536, rounds=3, requests={"range": 16, "lookup": 128}, cpu_requests=400)


class Memory(NamedTuple):
    """Of a process, in bytes: what is resident, and what of that is no mapped file."""

    resident: int
    anonymous: int


class Server(NamedTuple):
    """A running server."""

    process: ChildProcess
    port: int

    def memory(self) -> Memory:
        """Its memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return Memory(*(1024 * int(fields[name].split()[0]) for name in ("VmRSS", "RssAnon")))


class RequestRates(NamedTuple):
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
    """Everything that one run measured.

    Attributes:
        kinds: rows and bytes of one response, by kind.
        requests: to the service.
        measured: each kind at each concurrency.
        before, after: memory of the service, warm, and after all requests.
        cpu: CPU time per request of small ranges and raw keys.
    """

    kinds: dict[str, Kind]
    requests: int
    measured: list[RequestRates]
    before: Memory
    after: Memory
    cpu: list[CpuPerRequest]

    def document(self) -> dict[str, Any]:
        """Every figure, for programs."""
        return {
            "kinds": {
                name: {"rows": kind.num_rows, "bytes": kind.num_bytes}
                for name, kind in self.kinds.items()
            },
            "requests": self.requests,
            "measured": [each._asdict() for each in self.measured],
            "ratios": {kind: self.ratio(kind) for kind in TARGETS},
            "cpu_us": [each.document() for each in self.cpu],
            "memory": {"before": self.before._asdict(), "after": self.after._asdict()},
        }

    def ratio(self, kind: str) -> float:
        """The median over the concurrencies."""
        return statistics.median(each.ratio for each in self.measured if each.kind == kind)


class Kind(NamedTuple):
    """One kind of request: the size of a response, and the requests that are sent."""

    num_rows: int
    num_bytes: int
    requests: list[bytes]


def run_http_bench(sizes: Sizes, on_message: Callable[[str], None]) -> HttpBench:
    """Write a cache, serve it, measure, and remove everything.

    Raises:
        KdCacheError: a server did not start, or its responses are wrong.
    """
    with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as name:
        folder = Path(name)
        root = folder / "root"
        root.mkdir()
        on_message(f"writing {sizes.num_samples:,} rows")
        spec = write_bench_cache(str(root / CACHE), sizes.num_samples)
        kinds = {"range": _ranges(spec), "lookup": _lookups(spec)}
        service = [*KD_CACHE, "serve", str(root), "--port", "0", "--json"]
        small = {f"range of {rows} rows": _small_ranges(spec, rows) for rows in SMALL_ROWS}
        small |= {f"raw key, {rows} rows": _raw_ranges(spec, rows) for rows in SMALL_ROWS}
        lengths = [kind.num_bytes for kind in (*kinds.values(), *small.values())]
        constant = [*module_command("cli.experiments.bench.constant"), *map(str, lengths)]
        with (
            serving(service) as measured,
            serving(constant) as beside,
            static_files(folder, lengths) as static,
            _load() as load,
        ):
            _check_response(measured, str(root / CACHE), spec)
            result = _measure(sizes, kinds, load, (measured, beside), on_message)
            cpu = []
            for number, (label, kind) in enumerate(small.items(), len(kinds)):
                on_message(f"CPU time of a {label}")
                same = [_http("GET", f"/{number}")]
                targets = (
                    Target(measured.process.pid, measured.port, kind.requests),
                    Target(beside.process.pid, beside.port, same),
                    None if static is None else Target(*static, same),
                )
                times = cpu_per_request(
                    load, targets, requests=sizes.cpu_requests, rounds=sizes.rounds
                )
                cpu.append(CpuPerRequest(label, kind.num_bytes, *times))
            return result._replace(cpu=cpu)


@contextlib.contextmanager
def serving(command: Sequence[str]) -> Iterator[Server]:
    """A server whose first message is `{"url": ...}`; stopped at the end.

    Raises:
        KdCacheError: it does not start.
    """
    process = ChildProcess(command, log=LOG)
    try:
        message = process.receive()
        if message is None:
            raise KdCacheError(f"{' '.join(command)} did not start: {process.last_line()}")
        yield Server(process, int(message["url"].rpartition(":")[2]))
    finally:
        process.stop(STOP_S)


@contextlib.contextmanager
def _load() -> Iterator[Load]:
    """The client: one process for all measurements."""
    process = ChildProcess(module_command("cli.experiments.bench.load"), log=LOG)

    def measure(port: int, requests: Sequence[bytes], concurrency: int, count: int) -> Message:
        encoded = [base64.b64encode(each).decode() for each in requests]
        process.send(
            {"port": port, "requests": encoded, "concurrency": concurrency, "count": count}
        )
        measured = process.receive()
        if measured is None:
            raise KdCacheError(f"the load client ended: {process.last_line()}")
        return measured

    try:
        yield measure
    finally:
        process.wait()


def _measure(
    sizes: Sizes,
    kinds: dict[str, Kind],
    load: Load,
    servers: tuple[Server, Server],
    on_message: Callable[[str], None],
) -> HttpBench:
    service, constant = servers
    for kind in kinds.values():  # every page mapped, every thread started, before memory is read
        load(service.port, kind.requests, max(CONCURRENCY), 2 * DIFFERENT_REQUESTS)
    before, count = service.memory(), 0
    measured = []
    for number, (name, kind) in enumerate(kinds.items()):
        for clients in CONCURRENCY:
            on_message(f"{name}s of {kind.num_rows} rows over {clients} connections")
            times = max(sizes.requests[name], clients)
            same = [_http("GET", f"/{number}")]
            turns = [
                (
                    load(service.port, kind.requests, clients, times),
                    load(constant.port, same, clients, times),
                )
                for _ in range(sizes.rounds)
            ]
            measured.append(_summary(name, clients, turns))
            count += times * sizes.rounds
    return HttpBench(kinds, count, measured, before, service.memory(), [])


def _summary(
    kind: str, concurrency: int, turns: list[tuple[dict[str, Any], dict[str, Any]]]
) -> RequestRates:
    seconds = sum(turn["seconds"] for turn, _ in turns)
    beside = sum(turn["seconds"] for _, turn in turns)
    latencies_ms = 1000 * np.concatenate([turn["latencies"] for turn, _ in turns])
    return RequestRates(
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


def _small_ranges(spec: CacheSpec, rows: int) -> Kind:
    """Ranges as a trainer asks for that reads batch by batch, from one shard."""
    arrays, within = CacheLayout(spec).arrays, _within_a_shard(spec)
    head = frame_header(arrays, rows, range_metadata(spec.fingerprint, 0, 0, rows))
    starts = [rows * n % (within - rows + 1) for n in range(DIFFERENT_REQUESTS)]
    requests = [_http("GET", _rows_path(start, start + rows)) for start in starts]
    return Kind(rows, len(head) + values_size(arrays, rows), requests)


def _raw_ranges(spec: CacheSpec, rows: int) -> Kind:
    """Ranges of the object of one shard's logits, of as many bytes as the frames of rows."""
    num_bytes, layout = _small_ranges(spec, rows).num_bytes, CacheLayout(spec)
    within = _within_a_shard(spec) * layout.by_name["logits"].row_bytes
    path = f"/v1/caches/{CACHE}/zarr/{layout.object_key('logits', 0, 0)}"
    starts = [num_bytes * n % max(within - num_bytes, 1) for n in range(DIFFERENT_REQUESTS)]
    requests = [_http("GET", path, span=(start, start + num_bytes)) for start in starts]
    return Kind(rows, num_bytes, requests)


def _within_a_shard(spec: CacheSpec) -> int:
    return min(spec.layout.shard_rows, spec.dataset.num_samples)


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


def _http(
    method: str, path: str, body: bytes = b"", *, span: tuple[int, int] | None = None
) -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: */*\r\n"
    if span is not None:
        head += f"Range: bytes={span[0]}-{span[1] - 1}\r\n"
    if body:
        head += f"Content-Type: application/octet-stream\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


def _check_response(service: Server, path: str, spec: CacheSpec) -> None:
    """Check the responses that are timed: one range, compared with the cache itself."""
    import urllib3

    url = f"http://127.0.0.1:{service.port}{_rows_path(0, LOOKUP_ROWS)}"
    response = urllib3.request("GET", url)
    if response.status != 200:
        raise CorruptError(f"{url} responded {response.status}: {response.data[:300]!r}")
    arrays = CacheLayout(spec).arrays
    served = decode_frame(
        response.data,
        checksum=response.headers.get(CHECKSUM_HEADER),
        arrays=arrays,
        num_rows=LOOKUP_ROWS,
        metadata=range_metadata(spec.fingerprint, 0, 0, LOOKUP_ROWS),
        what=url,
    )
    stored = open_cache(path).read(0, 0, LOOKUP_ROWS)
    if not all(np.array_equal(served[name], stored[name]) for name in stored):
        raise CorruptError(f"{url} returned other rows than {path} holds.")


def bench_spec(num_samples: int, num_classes: int = NUM_CLASSES) -> CacheSpec:
    """One cell a view, float16: with ImageNet's thousand classes about 2 kB a row."""
    preprocess = Preprocess(size=VIEW_SIZE, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    draft = CacheSpec.model_validate(
        {
            "dataset": DatasetId(
                name="bench",
                split="train",
                num_samples=num_samples,
                num_classes=num_classes,
                sha256="0" * 64,
            ),
            "recipe": AugmentConfig(size=VIEW_SIZE, preset="none").recipe(),
            "teacher": TeacherId(
                model="bench",
                weights_sha256="0" * 64,
                num_classes=num_classes,
                preprocess=preprocess,
                map_side=1,
                affine_head=True,
            ),
            "scales": (1,),
            "stored_scales": (1,),
            "codec": {"kind": "dense"},
            "layout": Layout(shard_rows=2, chunk_rows=2),
        }
    )
    layout = default_layout(CacheLayout(draft).row_bytes, num_samples)  # as a build would choose
    return draft.model_copy(update={"layout": layout})


def write_bench_cache(url: str, num_samples: int, num_classes: int = NUM_CLASSES) -> CacheSpec:
    """One recorded seed of so many rows."""
    spec = bench_spec(num_samples, num_classes)
    writer = create_cache(open_storage(url), spec, num_seeds=1, versions={}, provenance={})
    rng = np.random.default_rng(0)
    order = epoch_order(num_samples, 0)
    views = np.zeros(CacheLayout(spec).witness_shape, np.uint8)
    for shard in range(spec.num_shards):
        start, stop = spec.shard_range(shard)
        writer.write_shard(0, shard, _rows(spec, order[start:stop], rng), views, {})
    return spec


def _rows(
    spec: CacheSpec, samples: NDArray[np.int32], rng: np.random.Generator
) -> dict[str, NDArray[Any]]:
    logits = rng.standard_normal((len(samples), 1, spec.teacher.num_classes), np.float32)
    labels = np.zeros((len(samples), 1), np.int64)
    words = rng.integers(0, 2**63, (2, len(samples)), dtype=np.uint64)
    encoded = spec.codec.encode(logits, labels)
    return {"sample": samples, "digest": words[0], "origin": words[1], **encoded}
