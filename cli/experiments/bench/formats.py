"""The formats that `bench stream` reads: kd-cache's, those of published tools, and the floor.

Every one of them holds the same rows of float16, and is written and read as its authors do: each
function names the code that it follows. All return a batch as one array that owns its memory.

Shape letters: N rows, B rows of a batch, C numbers of a row.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.rows.reader import Cache, open_cache

Halves = NDArray[np.float16]

FLOOR = "memory-mapped array"
OPEN_SHARDS = 64
"""As `distill` opens a cache whose rows it reads at random."""

LOGITS, ALL_ARRAYS = "kd-cache, logits", "kd-cache, all arrays"


class Opened(NamedTuple):
    """Rows that are ready to be read.

    Attributes:
        in_order: rows [start, stop); a format that has batches takes its own ones only.
        at_random: scattered rows; None where the format has no way to read one row.
        close: closes what it has open.
    """

    in_order: Callable[[int, int], Any]
    at_random: Callable[[NDArray[np.int64]], Any] | None
    close: Callable[[], None] = lambda: None


class Format(NamedTuple):
    """One way to keep rows.

    Attributes:
        name: for the table.
        write: the rows into a folder; None where the rows are those of kd-cache.
        open: the rows of a folder.
        files: a file a row, so that fewer rows are written.
        package: that it needs, if any.
    """

    name: str
    write: Callable[[Path, Halves, int], None] | None
    open: Callable[[Path, int], Opened]
    files: bool = False
    package: str = ""

    @property
    def is_installed(self) -> bool:
        """Whether the package that it needs is here."""
        return not self.package or importlib.util.find_spec(self.package) is not None


# The floor.


def _write_array(folder: Path, rows_NC: Halves, batch: int) -> None:
    del batch
    np.save(folder / "rows.npy", rows_NC)


def _open_array(folder: Path, batch: int) -> Opened:
    """Nothing that reads files by the page can copy rows faster."""
    del batch
    mapped = np.load(folder / "rows.npy", mmap_mode="r")
    rows_NC = np.ndarray(mapped.shape, mapped.dtype, buffer=mapped.data)
    return Opened(lambda start, stop: rows_NC[start:stop].copy(), lambda rows_B: rows_NC[rows_B])


# kd-cache.


def cache_rows(cache: Cache, arrays: tuple[str, ...] | None) -> Opened:
    """The rows of seed 0 of an open cache, some of its arrays or all."""
    return Opened(
        lambda start, stop: cache.read(0, start, stop, arrays=arrays)["logits"],
        lambda rows_B: cache.gather(0, rows_B, arrays=arrays)["logits"],
    )


def _open_logits(folder: Path, batch: int) -> Opened:
    del batch
    return cache_rows(open_cache(str(folder), open_shards=OPEN_SHARDS), ("logits",))


def _open_all_arrays(folder: Path, batch: int) -> Opened:
    """With the samples, and the digests of views and of what they were made from."""
    del batch
    return cache_rows(open_cache(str(folder), open_shards=OPEN_SHARDS), None)


def _open_tensorstore(folder: Path, batch: int) -> Opened:
    """The same bytes through another library that reads Zarr."""
    import tensorstore

    del batch
    where = {"driver": "file", "path": str(folder / "logits")}
    opened = tensorstore.open({"driver": "zarr3", "kvstore": where}, read=True).result()
    rows_N = opened[0]
    return Opened(
        lambda start, stop: rows_N[start:stop].read().result(),
        lambda rows_B: rows_N[rows_B].read().result(),
    )


# Formats of published tools.


def _write_records(folder: Path, rows_NC: Halves, batch: int) -> None:
    """A text file of keys and a file of records of one size: int32 seed, then the values."""
    del batch
    seeds_N4 = np.zeros((len(rows_NC), 4), np.uint8)
    np.concatenate([seeds_N4, rows_NC.view(np.uint8)], axis=1).tofile(folder / "rank0-values.bin")
    (folder / "rank0-keys.txt").write_text("".join(f"{row}\n" for row in range(len(rows_NC))))


def _open_records(folder: Path, batch: int) -> Opened:
    """A dict of all keys; for each sample a seek, a read, and copies of its parts.

    Source: TinyViT (microsoft/Cream), data/augmentation/manager.py and dataset_wrapper.py.
    """
    del batch
    keys = (folder / "rank0-keys.txt").read_text().split("\n")[:-1]
    numbers = {key: number for number, key in enumerate(keys)}
    values = (folder / "rank0-values.bin").open("rb")
    size = (folder / "rank0-values.bin").stat().st_size // len(keys)

    def one(key: str) -> Halves:
        values.seek(size * numbers[key])
        record = values.read(size)
        np.frombuffer(record[:4], np.int32)  # the seed of the view
        return np.frombuffer(record[4:], np.float16).copy()

    return _by_sample(one)._replace(close=values.close)


def _write_pickles(folder: Path, rows_NC: Halves, batch: int) -> None:
    """A file a sample: its index, and its answers with the parameters of each view."""
    del batch
    for row, values_C in enumerate(rows_NC):
        prob = torch.from_numpy(values_C.copy())
        torch.save((row, [{"params": {}, "prob": prob}]), folder / f"{row}.pth.tar")


def _open_pickles(folder: Path, batch: int) -> Opened:
    """A file is unpickled for each sample.

    Source: apple/ml-dr, dr/data.py, whose files have lists of the largest probabilities. FKD
    (szq0214/FKD) keeps a file a sample, too, with 500 views in each.
    """
    del batch

    def one(key: str) -> Halves:
        index, views = torch.load(folder / f"{key}.pth.tar")
        assert index == int(key)
        values_C: Halves = views[0]["prob"].numpy()
        return values_C

    return _by_sample(one)


def _by_sample(one: Callable[[str], Halves]) -> Opened:
    """A dataset of samples and the collation of its loader: what a batch costs in one process."""

    def collate(keys: list[int]) -> Halves:
        return np.stack([one(str(key)) for key in keys])

    return Opened(
        lambda start, stop: collate(list(range(start, stop))),
        lambda rows_B: collate(rows_B.tolist()),
    )


def _write_batches(folder: Path, rows_NC: Halves, batch: int) -> None:
    """A file a batch: crops, flips, the three of mixing, and the logits in float16."""
    for number, start in enumerate(range(0, len(rows_NC), batch)):
        rows_BC = torch.from_numpy(rows_NC[start : start + batch].copy())
        coords, flips = torch.zeros(len(rows_BC), 4), torch.zeros(len(rows_BC), dtype=torch.bool)
        config = [coords, flips, None, None, None, rows_BC]
        torch.save(config, folder / f"batch_{number}.tar")


def _open_batches(folder: Path, batch: int) -> Opened:
    """A file is loaded for each batch; it has no way to read another batch or one row.

    Source: SRe2L (VILA-Lab/SRe2L), relabel/utils_fkd.py, `load_batch_config`.
    """

    def whole(start: int, stop: int) -> Halves:
        rows_BC: Halves = torch.load(folder / f"batch_{start // batch}.tar")[5].numpy()
        assert len(rows_BC) == stop - start
        return rows_BC

    return Opened(whole, None)


def _write_arrow(folder: Path, rows_NC: Halves, batch: int) -> None:
    """An Arrow file with a column of lists of one length."""
    import datasets  # type: ignore[import-untyped]
    import pyarrow as pa  # type: ignore[import-untyped]

    del batch
    datasets.disable_progress_bars()
    values = pa.array(rows_NC.reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(values, rows_NC.shape[1])
    datasets.Dataset(pa.table({"logits": column})).save_to_disk(folder / "arrow")


def _open_arrow(folder: Path, batch: int) -> Opened:
    """Memory-mapped, as arrays; without `dtype` they would come as float32.

    Source: the Hugging Face datasets documentation, "Use with NumPy".
    """
    import datasets

    del batch
    rows_N = datasets.load_from_disk(str(folder / "arrow"))
    rows_N = rows_N.with_format("numpy", dtype=np.float16)
    return Opened(
        lambda start, stop: rows_N[start:stop]["logits"],
        lambda rows_B: rows_N[rows_B]["logits"],
    )


FORMATS = (
    Format(FLOOR, _write_array, _open_array),
    Format(LOGITS, None, _open_logits),
    Format(ALL_ARRAYS, None, _open_all_arrays),
    Format("tensorstore, the same files", None, _open_tensorstore, package="tensorstore"),
    Format("Arrow, Hugging Face datasets", _write_arrow, _open_arrow, package="datasets"),
    Format("records and keys, TinyViT", _write_records, _open_records),
    Format("a tensor file a batch, SRe2L", _write_batches, _open_batches),
    Format("a pickle a sample, ml-dr", _write_pickles, _open_pickles, files=True),
)
"""All that are compared, the floor first."""
