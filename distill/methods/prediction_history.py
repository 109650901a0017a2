"""The predictions a student made for each sample, kept on disk from one epoch to the next.

`out/prediction_history` holds one file per epoch with one record per sample: epoch, checksum and
float16 logits. Records are written one by one, so memory use does not grow with the dataset, and a
record that was never written counts as no prediction. A killed run continues from its checkpoint
and writes the later records again; files are removed only when no checkpoint needs them.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cache_service.errors import CorruptError, OutOfSpaceError
from cache_service.format.canonical import crc32c

FOLDER_NAME = "prediction_history"

_HEADER = struct.Struct("<II")
"""Epoch counted from 1, because a record that was never written is all zeros; then the CRC-32C."""

_LOWEST = -65504.0
"""The smallest float16. A logit this far below the largest one has probability 0 in any type."""


class PastPredictions(NamedTuple):
    """A student's predictions for a batch in an earlier epoch: float32 logits, up to an offset of
    each row, and whether there is a prediction; logits are 0 where there is none.
    """

    logits_BC: Tensor
    known_B: Tensor


class PredictionHistory:
    """The predictions of one student.

    Args:
        out: output folder of its run.
        num_samples: of the dataset.
        num_classes: C.
    """

    def __init__(self, out: str, *, num_samples: int, num_classes: int) -> None:
        self._folder = Path(out) / FOLDER_NAME
        self._num_samples = num_samples
        self._num_classes = num_classes
        self._record_bytes = _HEADER.size + 2 * num_classes

    def write(self, epoch: int, samples_B: Tensor, logits_BC: Tensor) -> None:
        """Store logits [B, C], as float16 differences from the largest of each row.

        Waits for the device.

        Raises:
            OutOfSpaceError: the file cannot be written.
        """
        gaps_BC = logits_BC.float() - logits_BC.float().amax(dim=-1, keepdim=True)
        rows_BC = gaps_BC.clamp(min=_LOWEST).half().cpu().numpy().astype("<f2")
        path = self._path(epoch)
        with _refusing_full_disk(path):
            if not path.exists():
                self._create(path)
            file = os.open(path, os.O_WRONLY)
            try:
                for sample, row_C in zip(samples_B.tolist(), rows_BC, strict=True):
                    record = self._record(epoch, sample, row_C.tobytes())
                    os.pwrite(file, record, sample * self._record_bytes)
            finally:
                os.close(file)

    def read(self, epoch: int, samples_B: Tensor) -> PastPredictions:
        """The predictions of an epoch for these samples; none for a negative epoch.

        Raises:
            CorruptError: the epoch's file is missing or truncated, or a record fails its checksum.
        """
        samples = samples_B.tolist()
        records = self._read_records(epoch, samples) if epoch >= 0 else [b""] * len(samples)
        known = [record.strip(b"\0") != b"" for record in records]
        logits_BC = np.zeros((len(records), self._num_classes), np.float32)
        for row, (sample, record) in enumerate(zip(samples, records, strict=True)):
            if known[row]:
                content = record[_HEADER.size :]
                if record != self._record(epoch, sample, content):
                    raise self._damaged(epoch, f"the record of sample {sample} is damaged")
                logits_BC[row] = np.frombuffer(content, "<f2")
        device = samples_B.device
        return PastPredictions(
            torch.from_numpy(logits_BC).to(device), torch.tensor(known, device=device)
        )

    def sync(self) -> None:
        """Flush everything to disk, before a checkpoint that relies on it is written."""
        if self._folder.exists():
            for path in [*sorted(self._folder.iterdir()), self._folder]:
                file = os.open(path, os.O_RDONLY)
                with _refusing_full_disk(path):
                    try:
                        os.fsync(file)
                    finally:
                        os.close(file)

    def prune(self, step: int, *, steps_per_epoch: int) -> None:
        """Remove every epoch that a run resumed at this step does not read: all but two at most."""
        epoch, index = divmod(step, steps_per_epoch)
        kept = {self._path(epoch - 1)} | ({self._path(epoch)} if index else set())
        if self._folder.exists():
            for path in sorted(set(self._folder.iterdir()) - kept):
                path.unlink()

    def _path(self, epoch: int) -> Path:
        return self._folder / f"{epoch:06d}.rows"

    def _create(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # At its full size from the start, so that truncation is noticed; holes take no space.
        with path.open("wb") as file:
            file.truncate(self._num_samples * self._record_bytes)

    def _record(self, epoch: int, sample: int, content: bytes) -> bytes:
        checksum = crc32c(_HEADER.pack(epoch + 1, sample) + content)
        return _HEADER.pack(epoch + 1, checksum) + content

    def _read_records(self, epoch: int, samples: list[int]) -> list[bytes]:
        path, size = self._path(epoch), self._record_bytes
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise self._damaged(epoch, "the file is missing") from None
        try:
            length = os.fstat(file).st_size
            if length != self._num_samples * size:
                raise self._damaged(epoch, f"it has {length} bytes, not {self._num_samples * size}")
            return [os.pread(file, size, sample * size) for sample in samples]
        finally:
            os.close(file)

    def _damaged(self, epoch: int, what: str) -> CorruptError:
        return CorruptError(
            f"{self._path(epoch)} should hold the student's predictions of epoch {epoch}, but "
            f"{what}.",
            hint="Choose another `out`, or move the checkpoint elsewhere to start over.",
        )


@contextmanager
def _refusing_full_disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise OutOfSpaceError(f"cannot write {path}: {problem.strerror}.") from problem
