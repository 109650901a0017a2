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
from distill.methods import requirements_of
from distill.optim import set_learning_rate
from distill.schedule import learning_rate
from distill.scores import Evaluation
from distill.step import TrainContext, train_step
from distill.student_state import StudentState
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


def identity_of(
    context: TrainContext, students: Sequence[StudentState], student: StudentState
) -> dict[str, Any]:
    """What fixes the steps of a student beside its own settings, as JSON."""
    identity = context.stream.facts.identity
    if not requirements_of(student.settings).peers:
        return identity
    peers = [each.name for each in students if requirements_of(each.settings).peers]
    return identity | {"peers": peers}


class Trainer(NamedTuple):
    """The parts of a run that is under way.

    Attributes:
        context: what the students learn from.
        shared: the train file of any of them, for what they have in common.
        students: the students.
        held_out: what they are scored on, if anything.
        records: files of each of them, by name.
        on_event: told about all of them.
    """

    context: TrainContext
    shared: TrainConfig
    students: Sequence[StudentState]
    held_out: HeldOut | None
    records: Mapping[str, Listener]
    on_event: Listener | None

    def train_epochs(self, stop: StopRequest) -> None:
        """Every step from where the student that is least far stands to the end.

        One that is further, because others joined it later, waits until they are there.
        """
        steps_per_epoch = self.context.stream.facts.plan.steps_per_epoch
        for student in self.students:
            self._tell(student, "start", self._facts(student))
        first = min(student.history.step for student in self.students)
        began, num_views = time.perf_counter(), 0
        groups = accumulation_groups(
            self.context.stream.batches(first), self.shared.accumulate, steps_per_epoch
        )
        for group in groups:
            begin, end = group[0].cursor.step, group[-1].cursor.step + 1
            students = [each for each in self.students if each.history.step == begin]
            self._update(students, group)
            num_views += _count(group)
            if end % steps_per_epoch == 0:
                seconds = time.perf_counter() - began
                timing: dict[str, Value] = {
                    "epoch_s": seconds,
                    "views_per_s": num_views / seconds,
                }
                self._finish_epoch(students, timing)
                began, num_views = time.perf_counter(), 0
            if stop.requested or self._checkpoint_is_due(begin, end):
                self._save(students)
            if stop.requested:
                raise KeyboardInterrupt
        for student in self.students:
            self._tell(student, "end", _named_scores(student.history.last))

    def _update(self, students: Sequence[StudentState], group: Sequence[Batch]) -> None:
        steps_per_epoch = self.context.stream.facts.plan.steps_per_epoch
        updates_per_epoch = -(-steps_per_epoch // self.shared.accumulate)
        epoch, index = divmod(group[0].cursor.step, steps_per_epoch)
        update = epoch * updates_per_epoch + index // self.shared.accumulate
        for student in students:
            lr = learning_rate(
                student.config.schedule,
                update,
                peak=student.config.optimizer.lr,
                updates_per_epoch=updates_per_epoch,
                epochs=self.shared.epochs,
            )
            set_learning_rate(student.optimizer, lr)
        for student, means in zip(students, train_step(self.context, students, group), strict=True):
            student.history.totals.add(means, _count(group))
            student.history.step = group[-1].cursor.step + 1
            if (update + 1) % self.shared.log_every == 0:
                self.context.watch.settle()
                values: dict[str, Value] = {"lr": _rate(student), **means.floats()}
                self._tell(student, "step", values, epoch=epoch)

    def _finish_epoch(self, students: Sequence[StudentState], timing: dict[str, Value]) -> None:
        epoch = students[0].history.step // self.context.stream.facts.plan.steps_per_epoch
        self.context.watch.settle()
        evaluations = self._evaluate(students, epoch)
        for student, evaluation in zip(students, evaluations, strict=True):
            scores = _named_scores(evaluation)
            if evaluation is not None:
                student.history.note(evaluation, epoch)
                self._tell(student, "evaluation", scores, epoch=epoch)
            totals = student.history.totals
            values = {"lr": _rate(student), **totals.means(), **timing}
            values |= scores if self.held_out is not None else {}
            self._tell(student, "epoch", values, epoch=epoch)
            totals.clear()

    def _evaluate(
        self, students: Sequence[StudentState], epoch: int
    ) -> Sequence[Evaluation | None]:
        settings = self.shared.evaluate
        is_due = epoch == self.shared.epochs or (settings and epoch % settings.every == 0)
        if self.held_out is None or not is_due:
            return [None] * len(students)
        networks = [Student(student.kept_model, student.preprocess) for student in students]
        return evaluate_students(networks, self.held_out, device=self.context.device)

    def _checkpoint_is_due(self, begin: int, end: int) -> bool:
        every, plan = self.shared.checkpoint_every, self.context.stream.facts.plan
        steps = every.steps or plan.steps_per_epoch * (every.epochs or 1)
        return end == plan.num_steps or end // steps > begin // steps

    def _save(self, students: Sequence[StudentState]) -> None:
        facts = self.context.stream.facts
        self.context.watch.settle()
        payloads = {}
        for student in students:
            refuse_spoiled(student.model, student.history.step, student=student.name)
            if student.predictions is not None:
                student.predictions.sync()
            payloads[student.name] = {
                **student.state(),
                "config": student.config.model_dump(mode="json"),
                "identity": identity_of(self.context, self.students, student),
                "num_classes": facts.num_classes,
                "classes": list(facts.classes),
                "view_size": facts.view_size,
                "preprocess": student.preprocess.model_dump(mode="json"),
            }
        save_checkpoints({student.name: student.config.out for student in students}, payloads)
        for student in students:
            if student.predictions is not None:
                # Only now: until then the checkpoint before might have needed older ones.
                student.predictions.prune(
                    student.history.step, steps_per_epoch=facts.plan.steps_per_epoch
                )
            self._tell(student, "checkpoint", {})

    def _tell(
        self,
        student: StudentState,
        kind: EventKind,
        values: dict[str, Value],
        *,
        epoch: int | None = None,
    ) -> None:
        step = student.history.step
        if epoch is None:
            epoch = step // self.context.stream.facts.plan.steps_per_epoch
        event = Event(kind, epoch, step, values)
        self.records[student.name](event)
        if self.on_event is not None:
            self.on_event(event._replace(student=student.name))

    def _facts(self, student: StudentState) -> dict[str, Value]:
        plan = self.context.stream.facts.plan
        return {
            "method": student.settings.name,
            "model": student.config.student.model,
            "num_parameters": sum(p.numel() for p in student.model.parameters()),
            "num_samples": plan.num_samples,
            "num_steps": plan.num_steps,
            "device": str(self.context.device),
            "torch": torch.__version__,
        }


def _count(group: Sequence[Batch]) -> int:
    return sum(len(batch.labels_B) for batch in group)


def _rate(student: StudentState) -> float:
    return float(student.optimizer.param_groups[0]["lr"])


def _named_scores(evaluation: Evaluation | None) -> dict[str, Value]:
    """Scores as `eval_top1` and so on; nothing known is null, so that columns stay."""
    names = ("top1", "top5", "nll", "ece")
    return {f"eval_{name}": getattr(evaluation, name, None) for name in names}
