"""Reports a run as events, in `metrics.jsonl` and `metrics.csv`, TensorBoard and Weights & Biases.

A resumed run first deletes all lines that were written after its checkpoint. The files therefore
contain each step once, even if the run was killed several times. Shape letter: V named values.
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
    """A report of a run, for files, progress bars and callbacks.

    Attributes:
        kind: `start` of the run, `step` for an update, `evaluation`, `epoch` at the end of an
            epoch, `checkpoint` after it is written, or `end` of the run.
        epoch: number of completed epochs; for `epoch` and `evaluation` it includes the epoch that
            has just ended.
        step: number of batches trained so far.
        values: values by name. Names of seconds end in `_s`, names of bytes in `_bytes`, and names
            of losses start with `loss`.
        student: name of the student; empty if the run has only one.
    """

    kind: EventKind
    epoch: int
    step: int
    values: dict[str, Value]
    student: str = ""

    def document(self) -> dict[str, Value]:
        """Return the event as a flat JSON object."""
        document: dict[str, Value] = {"kind": self.kind, "epoch": self.epoch, "step": self.step}
        return document | ({"student": self.student} if self.student else {}) | self.values


Listener = Callable[[Event], None]


class Named(NamedTuple):
    """Named numbers in one vector, which a single transfer copies from the GPU.

    Attributes:
        names: names of the values.
        values_V: the values, float32 or float64.
    """

    names: tuple[str, ...]
    values_V: Tensor

    def floats(self) -> dict[str, float]:
        """Copy the numbers to the host. This waits for the device."""
        return dict(zip(self.names, self.values_V.tolist(), strict=True))


def name_values(tensors: dict[str, Tensor]) -> Named:
    """Detach scalar tensors and stack them into one float32 vector."""
    values = [value.detach().float() for value in tensors.values()]
    return Named(tuple(tensors), torch.stack(values))


class EpochTotals:
    """Running means over an epoch, weighted by numbers of views.

    The sums stay on the device until they are read. They are part of a checkpoint, so an epoch that
    was interrupted and resumed reports the means over all its views.
    """

    def __init__(self) -> None:
        self.num_views = 0
        self._sums: Named | None = None

    def add(self, means: Named, num_views: int) -> None:
        """Add the means over a number of views."""
        # float64: thousands of float32 additions would lose digits of the mean.
        sums_V = means.values_V.double() * num_views
        if self._sums is not None:
            assert self._sums.names == means.names, "a method reports the same names every time"
            sums_V += self._sums.values_V
        self._sums = Named(means.names, sums_V)
        self.num_views += num_views

    def means(self) -> dict[str, float]:
        """Return the means over all views added. This waits for the device."""
        sums = self._sums.floats() if self._sums is not None else {}
        return {name: value / self.num_views for name, value in sums.items()}

    def clear(self) -> None:
        """Reset the sums for the next epoch."""
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
    """Provide a listener that writes metrics files to `out` and continues a run at `step`.

    Args:
        out: output folder.
        step: step of the checkpoint; lines of later steps are deleted.
        trackers: further listeners of the same events.

    Raises:
        ConfigError: a tracker is not installed or refuses the run.
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
    """Read the lines of `metrics.jsonl`. An incomplete last line of a killed run is skipped."""
    content = LocalStorage(out).get(LINES_NAME) or b""
    lines = []
    for line in content.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def _drop_after(out: str, step: int) -> list[dict[str, Any]]:
    # A run that starts at step 0 replaces the files of an older run.
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
                # Flushed per line, so that other programs can follow the run.
                file.flush()
            except OSError as problem:
                raise OutOfSpaceError(f"cannot write {path}: {problem.strerror}.") from problem

        yield write


class _EpochTable:
    """Writes one CSV row per epoch. The whole file is rewritten, because columns may be added."""

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
    """Replace infinities and NaN by null, because JSON cannot represent them."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in document.items()
    }


TENSORBOARD_NAME = "tensorboard"
WANDB_ID_NAME = "wandb-id.txt"

PRIVATE = {"dataset", "caches", "evaluate", "out"}
"""Settings that contain local paths. They are not sent to an external service."""


def trackers_of(config: TrainConfig, *, step: int) -> list[AbstractContextManager[Listener]]:
    """Return the trackers of a train file, which continue a run at `step`."""
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
    """Report to Weights & Biases. A resumed run uses the same id, and the service ignores steps
    that it has already received."""
    module = _import("wandb", f"wandb: {project} needs Weights & Biases.", extra="wandb")
    try:
        run = module.init(
            project=project,
            id=_wandb_id(config.out, step),
            name=Path(config.out).name,
            dir=config.out,
            resume="allow",
            reinit="create_new",  # each student is a separate run in this process
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
    """Return the id of the run at the service. It is created once and stored in `out`."""
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
    """Return the numbers of an event by names such as `step/loss`."""
    if event.kind == "start":
        return {}
    return {
        f"{event.kind}/{name}": value
        for name, value in event.values.items()
        if isinstance(value, int | float)
    }
