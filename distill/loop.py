"""Steps in order, for one student or several: reported, scored, kept.

One update is `distill.step.train_step`. Nothing here knows what a method computes or where rows
come from.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cache_service.interrupts import StopRequest
from distill.batches import Batch
from distill.checkpoint import save_checkpoints
from distill.config import TrainConfig
from distill.evaluate import HeldOut, evaluate_students
from distill.events import Event, EventKind, Listener, Value
from distill.finite import refuse_spoiled
from distill.learner import Learner
from distill.lesson import Run
from distill.methods import method_of
from distill.optim import set_learning_rate
from distill.schedule import learning_rate
from distill.scores import Evaluation
from distill.step import train_step
from distill.students import Student


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


def identity_of(run: Run, learners: Sequence[Learner], learner: Learner) -> dict[str, Any]:
    """What fixes the steps of a student beside its own settings, as JSON."""
    identity = run.stream.facts.identity
    if not method_of(learner.settings).asks_peers:
        return identity
    peers = [each.name for each in learners if method_of(each.settings).asks_peers]
    return identity | {"peers": peers}


class Loop(NamedTuple):
    """The parts of a run that is under way.

    Attributes:
        run: what the students learn from.
        shared: the train file of any of them, for what they have in common.
        learners: the students.
        held_out: what they are scored on, if anything.
        records: files of each of them, by name.
        on_event: told about all of them.
    """

    run: Run
    shared: TrainConfig
    learners: Sequence[Learner]
    held_out: HeldOut | None
    records: Mapping[str, Listener]
    on_event: Listener | None

    def train_epochs(self, stop: StopRequest) -> None:
        """Every step from where the student that is least far stands to the end.

        One that is further, because others joined it later, waits until they are there.
        """
        steps_per_epoch = self.run.stream.facts.plan.steps_per_epoch
        for learner in self.learners:
            self._tell(learner, "start", self._facts(learner))
        first = min(learner.history.step for learner in self.learners)
        began, num_views = time.perf_counter(), 0
        groups = accumulation_groups(
            self.run.stream.batches(first), self.shared.accumulate, steps_per_epoch
        )
        for group in groups:
            begin, end = group[0].cursor.step, group[-1].cursor.step + 1
            learners = [each for each in self.learners if each.history.step == begin]
            self._update(learners, group)
            num_views += _count(group)
            if end % steps_per_epoch == 0:
                seconds = time.perf_counter() - began
                timing: dict[str, Value] = {
                    "epoch_s": seconds,
                    "views_per_s": num_views / seconds,
                }
                self._finish_epoch(learners, timing)
                began, num_views = time.perf_counter(), 0
            if stop.requested or self._checkpoint_is_due(begin, end):
                self._save(learners)
            if stop.requested:
                raise KeyboardInterrupt
        for learner in self.learners:
            self._tell(learner, "end", _named_scores(learner.history.last))

    def _update(self, learners: Sequence[Learner], group: Sequence[Batch]) -> None:
        steps_per_epoch = self.run.stream.facts.plan.steps_per_epoch
        updates_per_epoch = -(-steps_per_epoch // self.shared.accumulate)
        epoch, index = divmod(group[0].cursor.step, steps_per_epoch)
        update = epoch * updates_per_epoch + index // self.shared.accumulate
        for learner in learners:
            lr = learning_rate(
                learner.config.schedule,
                update,
                peak=learner.config.optimizer.lr,
                updates_per_epoch=updates_per_epoch,
                epochs=self.shared.epochs,
            )
            set_learning_rate(learner.optimizer, lr)
        for learner, means in zip(learners, train_step(self.run, learners, group), strict=True):
            learner.history.totals.add(means, _count(group))
            learner.history.step = group[-1].cursor.step + 1
            if (update + 1) % self.shared.log_every == 0:
                self.run.watch.settle()
                values: dict[str, Value] = {"lr": _rate(learner), **means.floats()}
                self._tell(learner, "step", values, epoch=epoch)

    def _finish_epoch(self, learners: Sequence[Learner], timing: dict[str, Value]) -> None:
        epoch = learners[0].history.step // self.run.stream.facts.plan.steps_per_epoch
        self.run.watch.settle()
        evaluations = self._evaluate(learners, epoch)
        for learner, evaluation in zip(learners, evaluations, strict=True):
            scores = _named_scores(evaluation)
            if evaluation is not None:
                learner.history.note(evaluation, epoch)
                self._tell(learner, "evaluation", scores, epoch=epoch)
            totals = learner.history.totals
            values = {"lr": _rate(learner), **totals.means(), **timing}
            values |= scores if self.held_out is not None else {}
            self._tell(learner, "epoch", values, epoch=epoch)
            totals.clear()

    def _evaluate(self, learners: Sequence[Learner], epoch: int) -> Sequence[Evaluation | None]:
        settings = self.shared.evaluate
        is_due = epoch == self.shared.epochs or (settings and epoch % settings.every == 0)
        if self.held_out is None or not is_due:
            return [None] * len(learners)
        students = [Student(learner.kept_model, learner.preprocess) for learner in learners]
        return evaluate_students(students, self.held_out, device=self.run.device)

    def _checkpoint_is_due(self, begin: int, end: int) -> bool:
        every, plan = self.shared.checkpoint_every, self.run.stream.facts.plan
        steps = every.steps or plan.steps_per_epoch * (every.epochs or 1)
        return end == plan.num_steps or end // steps > begin // steps

    def _save(self, learners: Sequence[Learner]) -> None:
        facts = self.run.stream.facts
        self.run.watch.settle()
        payloads = {}
        for learner in learners:
            refuse_spoiled(learner.model, learner.history.step, student=learner.name)
            if learner.own_rows is not None:
                learner.own_rows.settle()
            payloads[learner.name] = {
                **learner.state(),
                "config": learner.config.model_dump(mode="json"),
                "identity": identity_of(self.run, self.learners, learner),
                "num_classes": facts.num_classes,
                "view_size": facts.view_size,
                "preprocess": learner.preprocess.model_dump(mode="json"),
            }
        save_checkpoints({learner.name: learner.config.out for learner in learners}, payloads)
        for learner in learners:
            if learner.own_rows is not None:
                # Only now: until then the checkpoint before might have needed older ones.
                learner.own_rows.keep_for(
                    learner.history.step, steps_per_epoch=facts.plan.steps_per_epoch
                )
            self._tell(learner, "checkpoint", {})

    def _tell(
        self,
        learner: Learner,
        kind: EventKind,
        values: dict[str, Value],
        *,
        epoch: int | None = None,
    ) -> None:
        step = learner.history.step
        if epoch is None:
            epoch = step // self.run.stream.facts.plan.steps_per_epoch
        event = Event(kind, epoch, step, values)
        self.records[learner.name](event)
        if self.on_event is not None:
            self.on_event(event._replace(student=learner.name))

    def _facts(self, learner: Learner) -> dict[str, Value]:
        plan = self.run.stream.facts.plan
        return {
            "method": learner.settings.name,
            "model": learner.config.student.model,
            "num_parameters": sum(p.numel() for p in learner.model.parameters()),
            "num_samples": plan.num_samples,
            "num_steps": plan.num_steps,
            "device": str(self.run.device),
            "torch": torch.__version__,
        }


def _count(group: Sequence[Batch]) -> int:
    return sum(len(batch.labels_B) for batch in group)


def _rate(learner: Learner) -> float:
    return float(learner.optimizer.param_groups[0]["lr"])


def _named_scores(evaluation: Evaluation | None) -> dict[str, Value]:
    """Scores as `eval_top1` and so on; nothing known is null, so that columns stay."""
    names = ("top1", "top5", "nll", "ece")
    return {f"eval_{name}": getattr(evaluation, name, None) for name in names}
