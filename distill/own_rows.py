"""A cache that a student fills itself: what it said about each sample, epoch by epoch.

One file an epoch in `own_rows` of its `out`, one record a sample: epoch, checksum, logits. Records
are written one by one, so memory stays small, and a record that was not written is no answer. A
killed run goes on from its checkpoint and writes what it had written since once more; files are
removed only where no checkpoint needs them.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cache_service.errors import CorruptError, OutOfSpaceError
from cache_service.format.canonical import crc32c
from distill.methods.base import Remembered

FOLDER_NAME = "own_rows"

_HEADER = struct.Struct("<II")
"""Epoch counted from 1, because all zeros is a record that was not written; and the CRC-32C."""

_LOWEST = -65504.0
"""Of float16. Less than that below the largest logit is probability 0 in any arithmetic."""


class OwnRows:
    """What one student said about each sample. Implements `distill.methods.base.Memory`.

    Args:
        out: of its run.
        num_samples: of the dataset.
        num_classes: C.
    """

    def __init__(self, out: str, *, num_samples: int, num_classes: int) -> None:
        self._folder = Path(out) / FOLDER_NAME
        self._num_samples = num_samples
        self._num_classes = num_classes
        self._record_bytes = _HEADER.size + 2 * num_classes

    def remember(self, epoch: int, samples_B: Tensor, logits_BC: Tensor) -> None:
        """Keep logits [B, C], as float16 differences to the largest of each row.

        Waits for the device.

        Raises:
            OutOfSpaceError: the file cannot be written.
        """
        gaps_BC = logits_BC.float() - logits_BC.float().amax(dim=-1, keepdim=True)
        rows_BC = gaps_BC.clamp(min=_LOWEST).half().cpu().numpy().astype("<f2")
        path = self._path(epoch)
        with _writing(path):
            if not path.exists():
                self._create(path)
            file = os.open(path, os.O_WRONLY)
            try:
                for sample, row_C in zip(samples_B.tolist(), rows_BC, strict=True):
                    record = self._record(epoch, sample, row_C.tobytes())
                    os.pwrite(file, record, sample * self._record_bytes)
            finally:
                os.close(file)

    def recall(self, epoch: int, samples_B: Tensor) -> Remembered:
        """What it said about these samples in an epoch; nothing before the first.

        Raises:
            CorruptError: the epoch's file is gone or cut short, or a record is not what it wrote.
        """
        records = self._read(epoch, samples_B.tolist()) if epoch >= 0 else [b""] * len(samples_B)
        known = [record.strip(b"\0") != b"" for record in records]
        logits_BC = np.zeros((len(records), self._num_classes), np.float32)
        for place, (sample, record) in enumerate(zip(samples_B.tolist(), records, strict=True)):
            if known[place]:
                content = record[_HEADER.size :]
                if record != self._record(epoch, sample, content):
                    raise self._damaged(epoch, f"the record of sample {sample} is damaged")
                logits_BC[place] = np.frombuffer(content, "<f2")
        device = samples_B.device
        return Remembered(
            torch.from_numpy(logits_BC).to(device), torch.tensor(known, device=device)
        )

    def settle(self) -> None:
        """Put everything said so far on disk, before a checkpoint counts on it."""
        if self._folder.exists():
            for path in [*sorted(self._folder.iterdir()), self._folder]:
                file = os.open(path, os.O_RDONLY)
                with _writing(path):
                    try:
                        os.fsync(file)
                    finally:
                        os.close(file)

    def keep_for(self, step: int, *, steps_per_epoch: int) -> None:
        """Remove what a run does not need that goes on from this step: all but two epochs."""
        epoch, index = divmod(step, steps_per_epoch)
        kept = {self._path(epoch - 1)} | ({self._path(epoch)} if index else set())
        if self._folder.exists():
            for path in sorted(set(self._folder.iterdir()) - kept):
                path.unlink()

    def _path(self, epoch: int) -> Path:
        return self._folder / f"{epoch:06d}.rows"

    def _create(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole from the start, so that one cut short is noticed; holes take no space.
        with path.open("wb") as file:
            file.truncate(self._num_samples * self._record_bytes)

    def _record(self, epoch: int, sample: int, content: bytes) -> bytes:
        checksum = crc32c(_HEADER.pack(epoch + 1, sample) + content)
        return _HEADER.pack(epoch + 1, checksum) + content

    def _read(self, epoch: int, samples: list[int]) -> list[bytes]:
        path, size = self._path(epoch), self._record_bytes
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise self._damaged(epoch, "it is gone") from None
        try:
            found = os.fstat(file).st_size
            if found != self._num_samples * size:
                raise self._damaged(epoch, f"it has {found} bytes, not {self._num_samples * size}")
            return [os.pread(file, size, sample * size) for sample in samples]
        finally:
            os.close(file)

    def _damaged(self, epoch: int, what: str) -> CorruptError:
        return CorruptError(
            f"{self._path(epoch)} should hold what the student said in epoch {epoch}, but {what}.",
            hint="Choose another `out`, or remove the checkpoint to start over.",
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise OutOfSpaceError(f"cannot write {path}: {problem.strerror}.") from problem
