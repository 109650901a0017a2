"""`bench stream`: rows per second into a training loop, in order and at random.

Rows of about 40 B, 2 kB and 300 kB are read batch by batch from local files, from the service over
loopback, and from a bucket, each beside what it cannot be faster than: a memory-mapped array, and
a plain transfer of the same bytes. The local rows are also kept in formats of published tools.
Formats take turns, so that other load on the machine affects all of them, and a ratio is the
median of the rounds' ratios.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cache_service.errors import CorruptError
from cache_service.human_format import human_bytes
from cache_service.rows.reader import open_cache
from cli.experiments.bench.formats import ALL_ARRAYS, FLOOR, FORMATS, LOGITS, Format, Halves, Opened
from cli.experiments.bench.http import write_bench_cache
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, Goal, spread
from cli.experiments.bench.transfers import over_http, over_s3

GOAL = 0.95
"""Smallest wanted part of the floor's speed, for rows of 2 kB and more that were read before."""

FIELD_GOAL = 1.0
"""Smallest wanted ratio to the fastest other format."""

WARM, REOPENED, COLD = "warm", "reopened", "cold"
STATES = (WARM, REOPENED, COLD)
"""Read before by this process; in memory, but opened anew; not in memory."""

LOCAL = "local files"

ORDERS = IN_ORDER, AT_RANDOM = "in order", "at random"

WARM_UP_S = 3.0
"""Time of the first pass over the rows at most, which is not counted."""


MAX_DRAWN = 256
"""Different batches of scattered rows in a turn at most."""

NOT_COLD = "not dropped"
"""In place of the speed of a cold turn that was none."""

BLOCK_BYTES = 512
"""The unit in which the system counts what came from a device."""

FLOOR_GOAL_BYTES = 2000

SHOWN_BYTES = 2020
"""Rows of a thousand classes: those of ImageNet."""


class RowSize(NamedTuple):
    """Rows of one row_size.

    Attributes:
        num_classes: of the logits, 2 bytes each; a row has 20 more.
        rows: of a cache.
        files: of the formats that have a file a row.
        batch: rows of a batch.
    """

    num_classes: int
    rows: int
    files: int
    batch: int

    @property
    def row_bytes(self) -> int:
        """Of a row with all its arrays."""
        return 20 + 2 * self.num_classes


class Sizes(NamedTuple):
    """How much is measured: sizes of rows, rounds, and the seconds of a turn."""

    row_sizes: tuple[RowSize, ...]
    rounds: int
    turn_s: float


FULL = Sizes(
    row_sizes=(
        RowSize(10, 1 << 18, 2048, 256),
        RowSize(1000, 1 << 16, 2048, 256),
        RowSize(150_000, 512, 512, 32),
    ),
    rounds=5,
    turn_s=0.12,
)
QUICK = Sizes(
    row_sizes=(RowSize(10, 512, 64, 32), RowSize(1000, 256, 64, 32), RowSize(150_000, 8, 8, 4)),
    rounds=1,
    turn_s=0.01,
)


class Timing(NamedTuple):
    """What one turn took, a row."""

    seconds: float
    cpu_seconds: float
    device_bytes: float


Timings = dict[tuple[str, str, str], list[Timing]]
"""By state, order and format."""


def measure_stream(options: BenchOptions) -> Iterator[Figures]:
    """Measure every size: local files, then the service, then the bucket if one is named."""
    sizes = QUICK if options.quick else FULL
    for row_size in sizes.row_sizes:
        with tempfile.TemporaryDirectory(prefix="kd-cache-bench-") as name:
            folder = Path(name)
            cache = folder / "root" / "cache"
            options.on_message(
                f"rows of {human_bytes(row_size.row_bytes)}: writing them in every format"
            )
            write_bench_cache(str(cache), row_size.rows, row_size.num_classes)
            yield _measure_local(row_size, sizes, folder, cache, options)
            options.on_message(f"rows of {human_bytes(row_size.row_bytes)}: over HTTP")
            with over_http(cache) as places:
                yield _measure_places(row_size, sizes, "HTTP", places)
            if options.s3 is not None:
                options.on_message(f"rows of {human_bytes(row_size.row_bytes)}: in a bucket")
                with over_s3(cache, options.s3) as places:
                    yield _measure_places(row_size, sizes, "S3", places)


# Local files.


class StoredRows(NamedTuple):
    """The rows of one size in one format."""

    format: Format
    folder: Path
    num_rows: int
    batch: int

    @contextlib.contextmanager
    def opened(self) -> Iterator[Opened]:
        """Open them, and close them at the end: a file that is mapped stays in memory."""
        opened = self.format.open(self.folder, self.batch)
        try:
            yield opened
        finally:
            opened.close()


def _measure_local(
    row_size: RowSize, sizes: Sizes, folder: Path, cache: Path, options: BenchOptions
) -> Figures:
    rows_NC = _read_all(cache)
    formats = [each for each in FORMATS if each.is_installed]
    kept = {each.name: _keep(each, row_size, folder, cache, rows_NC) for each in formats}
    for each in kept.values():
        _check(each, rows_NC)
    timings: Timings = defaultdict(list)
    for state in STATES:
        options.on_message(
            f"rows of {human_bytes(row_size.row_bytes)}, {state}: {sizes.rounds} rounds"
        )
        if state == WARM:
            _take_warm_turns(kept, row_size, sizes, timings)
        else:
            _take_turns_anew(kept, state, sizes, timings)
    return _figures(row_size, LOCAL, FLOOR, timings)


def _read_all(cache: Path) -> Halves:
    """All rows of seed 0, [N, C]."""
    opened = open_cache(str(cache))
    count = opened.spec.dataset.num_samples
    rows_NC: Halves = opened.read(0, 0, count, arrays=("logits",))["logits"].reshape(count, -1)
    return rows_NC


def _keep(
    each: Format, row_size: RowSize, folder: Path, cache: Path, rows_NC: Halves
) -> StoredRows:
    """Write the rows in a format; those of kd-cache are there already."""
    count = row_size.files if each.files else row_size.rows
    own = cache
    if each.write is not None:
        own = folder / f"format{FORMATS.index(each)}"
        own.mkdir()
        each.write(own, rows_NC[:count], row_size.batch)
    return StoredRows(each, own, count, row_size.batch)


def _check(kept: StoredRows, rows_NC: Halves) -> None:
    """Compare a batch in order and one at random with what was written.

    Raises:
        CorruptError: other rows came.
    """
    batch = kept.batch
    rows_B = np.random.default_rng(0).integers(0, kept.num_rows, batch)
    with kept.opened() as opened:
        found = [(opened.in_order(batch, 2 * batch), rows_NC[batch : 2 * batch])]
        if opened.at_random is not None:
            found.append((opened.at_random(rows_B), rows_NC[rows_B]))
    for rows_BC, expected_BC in found:
        if not np.array_equal(np.asarray(rows_BC).reshape(batch, -1), expected_BC):
            raise CorruptError(f"{kept.format.name} returned other rows than were written.")


def _read_once(opened: Opened, count: int, batch: int) -> None:
    """Read everything, so that pages are mapped and chunks are checked."""
    end = time.perf_counter() + WARM_UP_S
    for start in range(0, count, batch):
        opened.in_order(start, start + batch)
        if time.perf_counter() > end:
            return


def _take_warm_turns(
    kept: dict[str, StoredRows], row_size: RowSize, sizes: Sizes, timings: Timings
) -> None:
    """Rounds of formats that stay open. Nothing that is open outlives this function."""
    counts = {name: each.num_rows for name, each in kept.items()}
    with contextlib.ExitStack() as stack:
        warm = {name: stack.enter_context(each.opened()) for name, each in kept.items()}
        for name, opened in warm.items():
            _read_once(opened, counts[name], row_size.batch)
        _take_turns(warm, counts, row_size, sizes, timings)


def _take_turns_anew(
    kept: dict[str, StoredRows], state: str, sizes: Sizes, timings: Timings
) -> None:
    """Rounds in which every turn opens its rows, and reads each of them once at most."""
    for number in range(sizes.rounds):
        for name in _rotated(list(kept), number):
            for order in ORDERS:
                if state == COLD:
                    _drop_pages(kept[name].folder)
                with kept[name].opened() as opened:
                    calls = _calls(opened, kept[name].num_rows, kept[name].batch, order, number)
                    if calls is not None:
                        timing = _time_turn(calls, kept[name].batch, sizes.turn_s, once=True)
                        timings[state, order, name].append(timing)
                del opened, calls


def _drop_pages(folder: Path) -> None:
    """Write files to the disk and take them out of the system's page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


# The service and the bucket.


def _measure_places(
    row_size: RowSize, sizes: Sizes, where: str, places: dict[str, Opened]
) -> Figures:
    """Rounds of in order and at random; the first place is the floor."""
    timings: Timings = defaultdict(list)
    floor, *_ = places
    longer = sizes._replace(turn_s=2 * sizes.turn_s)
    _take_turns(places, dict.fromkeys(places, row_size.rows), row_size, longer, timings)
    return _figures(row_size, where, floor, timings)


# Turns.


def _take_turns(
    places: dict[str, Opened],
    counts: dict[str, int],
    row_size: RowSize,
    sizes: Sizes,
    timings: Timings,
) -> None:
    """Rounds of what stays open."""
    for number in range(sizes.rounds):
        for name in _rotated(list(places), number):
            for order in ORDERS:
                calls = _calls(places[name], counts[name], row_size.batch, order, number)
                if calls is not None:
                    timing = _time_turn(calls, row_size.batch, sizes.turn_s, once=False)
                    timings[WARM, order, name].append(timing)


def _rotated(names: list[str], number: int) -> list[str]:
    """A different one begins each round, so that none always follows the same one."""
    first = number % len(names)
    return names[first:] + names[:first]


Calls = tuple[Callable[..., object], list[tuple[Any, ...]]]


def _calls(opened: Opened, count: int, batch: int, order: str, number: int) -> Calls | None:
    """What reads a batch, and the arguments of as many batches as the rows have."""
    if order == IN_ORDER:
        return opened.in_order, [(start, start + batch) for start in range(0, count, batch)]
    if opened.at_random is None:
        return None
    rng = np.random.default_rng(number)
    drawn_MB = rng.integers(0, count, (min(count // batch, MAX_DRAWN), batch))
    return opened.at_random, [(rows_B,) for rows_B in drawn_MB]


def _time_turn(calls: Calls, batch: int, seconds: float, *, once: bool) -> Timing:
    """Read batches until the time is over, or, if `once`, all of them were read."""
    read, arguments = calls
    batches = 0
    used, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for each in arguments if once else itertools.cycle(arguments):
        read(*each)
        batches += 1
        if time.perf_counter() - began > seconds:
            break
    elapsed, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    rows = batches * batch
    cpu = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    blocks = after.ru_inblock - used.ru_inblock
    return Timing(elapsed / rows, cpu / rows, BLOCK_BYTES * blocks / rows)


def _figures(row_size: RowSize, where: str, floor: str, timings: Timings) -> Figures:
    return [
        {
            "row_bytes": row_size.row_bytes,
            "batch": row_size.batch,
            "where": where,
            "state": state,
            "order": order,
            "format": name,
            "is_floor": name == floor,
            "rows_per_s": [1 / timing.seconds for timing in own],
            "cpu_us_a_row": [1e6 * timing.cpu_seconds for timing in own],
            "device_bytes_a_row": statistics.median(timing.device_bytes for timing in own),
            "of_floor": [
                beside.seconds / timing.seconds
                for beside, timing in zip(timings[state, order, floor], own, strict=True)
            ],
        }
        for (state, order, name), own in timings.items()
    ]


# The page.


def stream_page(figures: Figures, options: BenchOptions) -> BenchPage:
    """The page of the figures."""
    dropped = [each["device_bytes_a_row"] for each in figures if each["state"] == COLD]
    notes = [
        (
            "Rows per second of one process, medians over rounds in which the formats take turns, "
            "and behind each the part of the floor's speed, a median of the rounds' ratios, with "
            "the least and the largest. The floor is the first line of each kind: a memory-mapped "
            "array, of which rows in order are copied and others gathered; a socket that sends as "
            "many bytes; plain requests for the bytes. The page has the spread of warm turns; the "
            "JSON document beside it has every turn, and the CPU time of a row."
        ),
        (
            f"{WARM}: this process has read all rows before. {REOPENED}: opened anew, the files "
            "in memory, so that kd-cache compares every chunk with its checksum. "
            f"{COLD}: written to the disk, taken out of the page cache (posix_fadvise), and "
            "opened anew; the disk and its host may still have them. Opening is not counted. "
            "kd-cache reads local files through memory maps and checks every byte on first use, "
            "tensorstore checks what it reads; the other formats check nothing."
        ),
        (
            "All formats hold the same float16 numbers, and a batch is one array. Sources: TinyViT "
            "(microsoft/Cream), ml-dr (apple), SRe2L (VILA-Lab), whose readers are followed line "
            "by line, in one process; a file a row or a batch is written for fewer rows, which "
            "does not slow them."
        ),
    ]
    if figures and options.s3 is None:
        notes.append("No bucket was named (`--s3 s3://BUCKET/PREFIX`), so none was measured.")
    if not all(dropped):
        notes.append(f"{NOT_COLD}: no byte came from a device, so the files were still in memory.")
    missing = [each.name for each in FORMATS if not each.is_installed]
    if missing:
        notes.append(f"Not installed, so not measured: {', '.join(missing)}.")
    return BenchPage(
        name="stream",
        title="Rows per second into a training loop",
        notes=notes,
        header=("row", "from", "read", "format", *STATES),
        rows=_rows(figures),
        figures=figures,
        goals=_goals(figures),
    )


def _rows(figures: Figures) -> list[list[str]]:
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for each in sorted(
        figures,
        key=lambda each: (
            each["row_bytes"],
            each["where"] != LOCAL,
            each["where"],
            each["order"] != IN_ORDER,
        ),
    ):
        key = human_bytes(each["row_bytes"]), each["where"], each["order"], each["format"]
        if each["state"] == COLD and not each["device_bytes_a_row"]:
            shown = NOT_COLD
        else:
            shown = _speed(each)
        lines.setdefault(key, {})[each["state"]] = shown
    return [[*key, *(cells.get(state, "") for state in STATES)] for key, cells in lines.items()]


def _speed(figure: dict[str, Any]) -> str:
    speed = f"{statistics.median(figure['rows_per_s']):,.0f}"
    if figure["is_floor"]:
        return speed
    if figure["state"] == WARM:
        return f"{speed}: {spread(figure['of_floor'])}"
    return f"{speed}: {statistics.median(figure['of_floor']):.3f}"


def _goals(figures: Figures) -> list[Goal]:
    """Of local rows that were read before, beside the floor and the fastest other format."""
    goals = []
    for own in figures:
        if own["format"] != LOGITS or own["where"] != LOCAL or own["state"] != WARM:
            continue
        what = f"rows of {human_bytes(own['row_bytes'])} {own['order']}"
        if own["row_bytes"] >= FLOOR_GOAL_BYTES:
            ratio = statistics.median(own["of_floor"])
            goals.append(Goal(f"{what}: rows/s / {FLOOR}", GOAL, ratio, at_least=True))
        best = fastest_other(figures, own)
        ratio = ratio_to(own, best)
        goals.append(Goal(f"{what}: rows/s / {best['format']}", FIELD_GOAL, ratio, at_least=True))
    return goals


def fastest_other(figures: Figures, own: dict[str, Any]) -> dict[str, Any]:
    """Of the formats of other tools, the fastest that was read as `own` was."""
    others = [each for each in figures if _is_other(each, own)]
    return max(others, key=lambda each: statistics.median(each["of_floor"]))


def ratio_to(own: dict[str, Any], other: dict[str, Any]) -> float:
    """Rows per second over those of another format, a median of the rounds' ratios."""
    pairs = zip(own["rows_per_s"], other["rows_per_s"], strict=True)
    ratios: list[float] = [mine / its for mine, its in pairs]
    return statistics.median(ratios)


def _is_other(figure: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether it is of another format than kd-cache's, beside the same floor."""
    same = ("row_bytes", "where", "order", "state")
    if figure["is_floor"] or figure["format"] in (LOGITS, ALL_ARRAYS):
        return False
    return all(figure[name] == own[name] for name in same)
