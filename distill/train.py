"""Train a student: steps in order, reported, scored, kept and resumed.

One update is `distill.step.train_step`. Nothing here knows what a method computes or where rows
come from.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from cache_service.interrupts import StopRequest, stop_on_signal
from cache_service.storage.local import LocalStorage
from distill.batches import Batch
from distill.checkpoint import (
    CHECKPOINT_NAME,
    Payload,
    load_checkpoint,
    refuse_other_config,
    refuse_other_rows,
    save_checkpoint,
)
from distill.config import TrainConfig
from distill.evaluate import HeldOut, evaluate
from distill.events import Event, EventKind, Listener, Value
from distill.export import export_student
from distill.finite import FiniteWatch, refuse_spoiled
from distill.history import History
from distill.learner import Learner, make_learner
from distill.metrics import metrics_files
from distill.optim import set_learning_rate
from distill.randomness import private_random
from distill.schedule import learning_rate
from distill.scores import Evaluation
from distill.step import Run, train_step
from distill.stream import LiveStream, LiveTeacher, Stream, open_stream
from distill.students import Student, choose_device

CONFIG_NAME = "config.yaml"


class TrainResult(NamedTuple):
    """What a run ends with: the student as it is evaluated, and how it got there."""

    student: Student
    history: History


def train(
    config: TrainConfig,
    *,
    stream: Stream | None = None,
    teachers: Sequence[LiveTeacher] = (),
    on_event: Listener | None = None,
) -> TrainResult:
    """Train as a train file says, or go on from the checkpoint in its `out`.

    A resumed run takes the very steps that an unbroken one would have taken. On the first Ctrl-C
    or SIGTERM the step under way is finished and kept.

    Args:
        config: the train file.
        stream: batches from elsewhere than the file's dataset and caches.
        teachers: run these beside the student instead of reading recorded answers.
        on_event: told of every step, epoch and checkpoint that is reported.

    Raises:
        KeyboardInterrupt: stopped by a signal; the checkpoint holds everything so far.
        NonFiniteError: a loss is no number; the last checkpoint is from before.
        ConfigError, SpecMismatchError: the checkpoint there is of another run.
        KdCacheError: dataset, caches, model and method do not suit each other; see the message.
    """
    device = choose_device(config.device)
    saved = _load_own_checkpoint(config)
    if stream is None:
        seeds = saved["identity"]["seeds"] if saved is not None else None
        stream = open_stream(config, device=device, seeds=seeds)
    if teachers:
        stream = LiveStream(stream, teachers)
    _refuse_other_stream(config, saved, stream)
    history = History()
    with private_random(device), stop_on_signal() as stop:
        learner = make_learner(config, stream, device)
        if saved is not None:
            learner.restore(saved)
            history.restore(saved["history"], device)
        held_out = _open_held_out(config, stream)
        run = Run(config, stream, device, FiniteWatch(device))
        _write_config(config)
        with metrics_files(config.out, step=history.step, tensorboard=config.tensorboard) as record:
            listeners = (record,) if on_event is None else (record, on_event)
            _Trainer(run, learner, history, held_out, listeners).train_epochs(stop)
    student = Student(learner.kept_model.eval(), learner.preprocess)
    export_student(
        config.out, student, name=config.student.model, num_classes=stream.facts.num_classes
    )
    return TrainResult(student, history)


def accumulation_groups(
    batches: Iterable[Batch], size: int, steps_per_epoch: int
) -> Iterator[list[Batch]]:
    """Groups of `size` batches; the last group of an epoch has what is left."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size or (batch.cursor.step + 1) % steps_per_epoch == 0:
            yield group
            group = []


class _Trainer(NamedTuple):
    """The parts of a run that is under way."""

    run: Run
    learner: Learner
    history: History
    held_out: HeldOut | None
    listeners: tuple[Listener, ...]

    def train_epochs(self, stop: StopRequest) -> None:
        """Every step from where the history stands to the end."""
        run, history = self.run, self.history
        steps_per_epoch = run.stream.facts.plan.steps_per_epoch
        self._tell("start", self._facts())
        epoch_began, views_before = time.perf_counter(), history.totals.num_views
        groups = accumulation_groups(
            run.stream.batches(history.step), run.config.accumulate, steps_per_epoch
        )
        for group in groups:
            begun_at = history.step
            self._update(group)
            if history.step % steps_per_epoch == 0:
                seconds = time.perf_counter() - epoch_began
                views = history.totals.num_views - views_before
                self._finish_epoch({"epoch_s": seconds, "views_per_s": views / seconds})
                epoch_began, views_before = time.perf_counter(), 0
            if stop.requested or self._checkpoint_is_due(begun_at):
                self._save()
            if stop.requested:
                raise KeyboardInterrupt
        self._tell("end", _named_scores(history.last))

    def _update(self, group: Sequence[Batch]) -> None:
        run, history = self.run, self.history
        config, steps_per_epoch = run.config, run.stream.facts.plan.steps_per_epoch
        updates_per_epoch = -(-steps_per_epoch // config.accumulate)
        epoch, index = divmod(group[0].cursor.step, steps_per_epoch)
        update = epoch * updates_per_epoch + index // config.accumulate
        lr = learning_rate(
            config.schedule,
            update,
            peak=config.optimizer.lr,
            updates_per_epoch=updates_per_epoch,
            epochs=config.epochs,
        )
        set_learning_rate(self.learner.optimizer, lr)
        means = train_step(run, self.learner, group)
        history.totals.add(means, sum(len(batch.labels_B) for batch in group))
        history.step = group[-1].cursor.step + 1
        if (update + 1) % config.log_every == 0:
            run.watch.settle()
            self._tell("step", {"lr": lr, **means.floats()}, epoch=epoch)

    def _finish_epoch(self, timing: dict[str, Value]) -> None:
        history, config = self.history, self.run.config
        self.run.watch.settle()
        epoch = history.step // self.run.stream.facts.plan.steps_per_epoch
        scores = _named_scores(None)
        is_due = epoch == config.epochs or (
            config.evaluate is not None and epoch % config.evaluate.every == 0
        )
        if self.held_out is not None and is_due:
            evaluation = evaluate(
                self.learner.kept_model,
                self.held_out,
                self.learner.preprocess,
                device=self.run.device,
            )
            history.note(evaluation, epoch)
            scores = _named_scores(evaluation)
            self._tell("evaluation", scores, epoch=epoch)
        lr = float(self.learner.optimizer.param_groups[0]["lr"])
        values = {"lr": lr, **history.totals.means(), **timing}
        self._tell("epoch", values | (scores if self.held_out is not None else {}), epoch=epoch)
        history.totals.clear()

    def _checkpoint_is_due(self, begun_at: int) -> bool:
        every, plan = self.run.config.checkpoint_every, self.run.stream.facts.plan
        steps = every.steps or plan.steps_per_epoch * (every.epochs or 1)
        step = self.history.step
        return step == plan.num_steps or step // steps > begun_at // steps

    def _save(self) -> None:
        run, learner, step = self.run, self.learner, self.history.step
        run.watch.settle()
        refuse_spoiled(learner.model, step)
        payload: Payload = {
            **learner.state(),
            "history": self.history.state(),
            "config": run.config.model_dump(mode="json"),
            "identity": run.stream.facts.identity,
            "num_classes": run.stream.facts.num_classes,
            "view_size": run.stream.facts.view_size,
            "preprocess": learner.preprocess.model_dump(mode="json"),
        }
        save_checkpoint(run.config.out, payload)
        self._tell("checkpoint", {})

    def _tell(self, kind: EventKind, values: dict[str, Value], *, epoch: int | None = None) -> None:
        step = self.history.step
        if epoch is None:
            epoch = step // self.run.stream.facts.plan.steps_per_epoch
        for listener in self.listeners:
            listener(Event(kind, epoch, step, values))

    def _facts(self) -> dict[str, Value]:
        run, plan = self.run, self.run.stream.facts.plan
        return {
            "method": run.config.method.name,
            "model": run.config.student.model,
            "num_parameters": sum(p.numel() for p in self.learner.model.parameters()),
            "num_samples": plan.num_samples,
            "num_steps": plan.num_steps,
            "device": str(run.device),
            "torch": torch.__version__,
        }


def _load_own_checkpoint(config: TrainConfig) -> Payload | None:
    path = Path(config.out) / CHECKPOINT_NAME
    saved = load_checkpoint(path)
    if saved is not None:
        refuse_other_config(path, saved, config.model_dump(mode="json"))
    return saved


def _refuse_other_stream(config: TrainConfig, saved: Payload | None, stream: Stream) -> None:
    if saved is not None:
        refuse_other_rows(Path(config.out) / CHECKPOINT_NAME, saved, stream.facts.identity)


def _open_held_out(config: TrainConfig, stream: Stream) -> HeldOut | None:
    if config.evaluate is None:
        return None
    return HeldOut(
        config.evaluate,
        num_classes=stream.facts.num_classes,
        view_size=stream.facts.view_size,
        batch_size=config.batch_size,
        workers=config.workers,
    )


def _write_config(config: TrainConfig) -> None:
    """The train file in full, defaults included, beside what came of it."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    storage = LocalStorage(config.out)
    storage.put(CONFIG_NAME, text.encode())
    storage.sweep()


def _named_scores(evaluation: Evaluation | None) -> dict[str, Value]:
    """Scores as `eval_top1` and so on; nothing known is null, so that columns stay."""
    names = ("top1", "top5", "nll", "ece")
    return {f"eval_{name}": getattr(evaluation, name, None) for name in names}
