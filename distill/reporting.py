"""What a run reports: events, `metrics.jsonl` and `metrics.csv`, TensorBoard, Weights & Biases.

A run that resumes first drops what was written after its checkpoint, so its files hold each step
once, however often it was killed. Shape letter: V named values.
"""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cache_service.errors import ConfigError, OutOfSpaceError
from cache_service.storage.local import LocalStorage
from distill.config import TrainConfig

Value = float | int | str | None


EventKind = Literal["start", "step", "evaluation", "epoch", "checkpoint", "end"]


class Event(NamedTuple):
    """One report of a run, the same for files, progress bars and callbacks.

    Attributes:
        kind: `start` of the run, a `step` (an update that is reported), an `evaluation`, an
            `epoch` that is complete, a `checkpoint` written, the `end`.
        epoch: epochs completed before it, or for `epoch` and `evaluation` with it.
        step: batches trained on so far.
        values: by name; seconds end in `_s`, bytes in `_bytes`, losses start with `loss`.
        student: whose it is; empty where there is only one.
    """

    kind: EventKind
    epoch: int
    step: int
    values: dict[str, Value]
    student: str = ""

    def document(self) -> dict[str, Value]:
        """The event as one flat JSON object."""
        document: dict[str, Value] = {"kind": self.kind, "epoch": self.epoch, "step": self.step}
        return document | ({"student": self.student} if self.student else {}) | self.values


Listener = Callable[[Event], None]


class Named(NamedTuple):
    """Numbers by name, as one vector, so that a GPU is waited for once for all of them.

    Attributes:
        names: what they are.
        values_V: float32 or wider.
    """

    names: tuple[str, ...]
    values_V: Tensor

    def floats(self) -> dict[str, float]:
        """The numbers on the host. Waits for the device."""
        return dict(zip(self.names, self.values_V.tolist(), strict=True))


def name_values(tensors: dict[str, Tensor]) -> Named:
    """Detached () tensors as one float32 vector."""
    values = [value.detach().float() for value in tensors.values()]
    return Named(tuple(tensors), torch.stack(values))


class EpochTotals:
    """Running means over an epoch, weighted by numbers of views.

    They stay on the device until they are read, and are part of a checkpoint, so that an epoch in
    which a run was stopped reports all its views.
    """

    def __init__(self) -> None:
        self.num_views = 0
        self._sums: Named | None = None

    def add(self, means: Named, num_views: int) -> None:
        """Add the means over some views."""
        sums_V = means.values_V.double() * num_views
        if self._sums is not None:
            assert self._sums.names == means.names, "a method reports the same names every time"
            sums_V += self._sums.values_V
        self._sums = Named(means.names, sums_V)
        self.num_views += num_views

    def means(self) -> dict[str, float]:
        """Means over everything added. Waits for the device."""
        sums = self._sums.floats() if self._sums is not None else {}
        return {name: value / self.num_views for name, value in sums.items()}

    def clear(self) -> None:
        """Start another epoch."""
        self.num_views = 0
        self._sums = None

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        sums = None if self._sums is None else [list(self._sums.names), self._sums.values_V]
        return {"num_views": self.num_views, "sums": sums}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from a checkpoint."""
        self.num_views = state["num_views"]
        self._sums = None
        if state["sums"] is not None:
            names, values_V = state["sums"]
            self._sums = Named(tuple(names), values_V.to(device))


LINES_NAME = "metrics.jsonl"
TABLE_NAME = "metrics.csv"

RECORDED = {"start", "step", "evaluation", "epoch"}


@contextmanager
def metrics_files(
    out: str, *, step: int, trackers: Sequence[AbstractContextManager[Listener]] = ()
) -> Iterator[Listener]:
    """A listener that writes to the folder `out`, as the continuation of a run at `step`.

    Args:
        out: the folder.
        step: lines of later steps are dropped.
        trackers: called with the same events.

    Raises:
        ConfigError: a requested tracker is not installed or refuses the run.
        OutOfSpaceError, StorageError: the folder cannot be written.
    """
    writers: list[Listener] = []
    with ExitStack() as stack:
        writers.extend(stack.enter_context(tracker) for tracker in trackers)
        kept = _drop_after(out, step)
        writers.append(_EpochTable(out, [line for line in kept if line["kind"] == "epoch"]))
        writers.append(stack.enter_context(_lines(out)))

        def write(event: Event) -> None:
            if event.kind in RECORDED:
                for writer in writers:
                    writer(event)

        yield write


def read_metrics(out: str) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a kill cut short is left out."""
    content = LocalStorage(out).get(LINES_NAME) or b""
    lines = []
    for line in content.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _drop_after(out: str, step: int) -> list[dict[str, Any]]:
    lines = read_metrics(out) if step else []
    kept = [line for line in lines if line["step"] <= step]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    storage = LocalStorage(out)
    storage.put(LINES_NAME, text.encode())
    storage.sweep()
    return kept


@contextmanager
def _lines(out: str) -> Iterator[Listener]:
    path = Path(out) / LINES_NAME
    with path.open("a", encoding="utf-8") as file:

        def write(event: Event) -> None:
            try:
                file.write(json.dumps(finite(event.document())) + "\n")
                file.flush()
            except OSError as problem:
                raise OutOfSpaceError(f"cannot write {path}: {problem.strerror}.") from problem

        yield write


class _EpochTable:
    """One row per epoch. The file is rewritten each time: a new column changes its header."""

    def __init__(self, out: str, rows: list[dict[str, Value]]) -> None:
        self._storage = LocalStorage(out)
        self._rows = [{k: v for k, v in row.items() if k != "kind"} for row in rows]

    def __call__(self, event: Event) -> None:
        if event.kind != "epoch":
            return
        self._rows.append({"epoch": event.epoch, "step": event.step, **event.values})
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        self._storage.put(TABLE_NAME, text.getvalue().encode())
        self._storage.sweep()


def finite(document: dict[str, Value]) -> dict[str, Value]:
    """The document with null for infinities and NaN, which JSON does not have."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in document.items()
    }


TENSORBOARD_NAME = "tensorboard"
WANDB_ID_NAME = "wandb-id.txt"

PRIVATE = {"dataset", "caches", "evaluate", "out"}
"""Settings that hold local paths, which are not sent to a service."""


def trackers_of(config: TrainConfig, *, step: int) -> list[AbstractContextManager[Listener]]:
    """The trackers of a train file, as the continuation of a run at `step`."""
    trackers: list[AbstractContextManager[Listener]] = []
    if config.tensorboard:
        trackers.append(_tensorboard(config.out, step))
    if config.wandb is not None:
        trackers.append(_wandb(config, config.wandb, step))
    return trackers


@contextmanager
def _tensorboard(out: str, step: int) -> Iterator[Listener]:
    module = _import(
        "torch.utils.tensorboard", "tensorboard: true needs TensorBoard.", extra="track"
    )
    writer = module.SummaryWriter(str(Path(out) / TENSORBOARD_NAME), purge_step=step)

    def write(event: Event) -> None:
        for name, value in _numbers(event).items():
            writer.add_scalar(name, value, event.step)

    try:
        yield write
    finally:
        writer.close()


@contextmanager
def _wandb(config: TrainConfig, project: str, step: int) -> Iterator[Listener]:
    """A resumed run keeps its id; the service ignores steps that it already has."""
    module = _import("wandb", f"wandb: {project} needs Weights & Biases.", extra="wandb")
    try:
        run = module.init(
            project=project,
            id=_wandb_id(config.out, step),
            name=Path(config.out).name,
            dir=config.out,
            resume="allow",
            reinit="create_new",  # several students are several runs of one process
            config=config.model_dump(mode="json", exclude=PRIVATE),
        )
    except module.errors.Error as problem:
        first_line = (str(problem).splitlines() or [""])[0]
        raise ConfigError(
            f"Weights & Biases refuses a run of project {project}: {first_line}.",
            hint="Run `wandb login`, or set WANDB_MODE=offline.",
        ) from problem

    def write(event: Event) -> None:
        numbers = _numbers(event)
        if numbers:
            run.log(numbers, step=event.step)

    try:
        yield write
    finally:
        run.finish()


def _wandb_id(out: str, step: int) -> str:
    """The id of the run at the service, created at its first step and kept in `out`."""
    storage = LocalStorage(out)
    known = storage.get(WANDB_ID_NAME)
    if known is not None and step:
        return known.decode().strip()
    created = uuid.uuid4().hex[:16]
    storage.put(WANDB_ID_NAME, f"{created}\n".encode())
    storage.sweep()
    return created


def _import(name: str, needs: str, *, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(needs, hint=f"Run `pip install 'kd-cache[{extra}]'`.") from error


def _numbers(event: Event) -> dict[str, float]:
    """The numbers of an event under names such as `step/loss`."""
    if event.kind == "start":
        return {}
    return {
        f"{event.kind}/{name}": value
        for name, value in event.values.items()
        if isinstance(value, int | float)
    }
