"""Trains a student a few steps at a time, so that several ways of training take turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cache_service.recording.build_config import BuildConfig
from cli.experiments.bench.pairs import Pair, train_file
from cli.experiments.bench.variants import Variant
from cli.experiments.measure import live_teacher
from distill.batches import Batch
from distill.config import TrainConfig
from distill.finite import NonFiniteCheck
from distill.step import TrainContext, train_step
from distill.stream import LiveStream, Stream, open_stream
from distill.students import choose_device, make_student_state

HELD_BATCHES = 8
"""Batches that are rendered once and trained on in turn, to time a step without its loader."""


class StepLoop:
    """The steps of one variant.

    Args:
        pair: the networks.
        build: the build file of the recording.
        variant: how the student is trained.
        folder: for the student's files; nothing is written.
        held: train on the same few batches, which are rendered before, in place of new ones.
    """

    def __init__(
        self, pair: Pair, build: BuildConfig, variant: Variant, folder: Path, *, held: bool
    ) -> None:
        config = train_file(
            pair,
            build,
            method=variant.method,
            cached=variant.teacher == "cache",
            out=folder / "student",
            epochs=10_000,  # more than are ever trained, so that the batches do not end
        )
        self._device = choose_device(config.device)
        stream = _stream(config, build, variant, self._device)
        self._context = TrainContext(stream, self._device, NonFiniteCheck(self._device))
        self._student = make_student_state(config, stream, self._device)
        self._batches = stream.batches(0)
        if held:
            self._batches = _hold(self._batches)

    def run(self, steps: int) -> float:
        """Take some steps and return their wall time, seconds."""
        self._wait()
        began = time.perf_counter()
        for batch in itertools.islice(self._batches, steps):
            train_step(self._context, [self._student], [batch])
        self._wait()
        seconds = time.perf_counter() - began
        self._context.non_finite.check()
        return seconds

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _stream(
    config: TrainConfig, build: BuildConfig, variant: Variant, device: torch.device
) -> Stream:
    stream: Stream = open_stream(config, device=device, methods=[config.method])
    if variant.teacher == "live":
        scales = build.scales if variant.has_cells else (1,)
        teacher = live_teacher(build.teacher, config, device, scales=scales)
        stream = LiveStream(stream, [teacher])
    return stream


def _hold(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Repeat the first batches. Those of a loader with processes end with it."""
    return itertools.cycle(list(itertools.islice(batches, HELD_BATCHES)))
