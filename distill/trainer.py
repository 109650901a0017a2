"""Trains one or several students, writes their files to `out` and resumes from checkpoints.

`distill.step.train_step` computes one update. This module does not depend on the method or on the
source of the rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cache_service.config import dump_yaml
from cache_service.errors import ConfigError
from cache_service.interrupts import StoppedWaitingError, StopRequest, stop_on_signal
from cache_service.storage.local import LocalStorage
from distill.batches import Batch, BatchPlan
from distill.checkpoint import (
    CHECKPOINT_NAME,
    Payload,
    load_checkpoints,
    refuse_other_config,
    refuse_other_rows,
    save_checkpoints,
)
from distill.config import TrainConfig
from distill.evaluate import HeldOut, evaluate_students
from distill.export import CONFIG_NAME, export_student
from distill.finite import NonFiniteCheck, refuse_non_finite_weights
from distill.methods import requirements_of
from distill.multi_student import refuse_apart_peers, refuse_unlike
from distill.optim import learning_rate, set_learning_rate
from distill.rank_checks import refuse_on_ranks, refuse_other_stream
from distill.ranks import Ranks, StoppedTogether, join_ranks, own_device
from distill.reporting import Event, EventKind, Listener, Value, metrics_files, trackers_of
from distill.scores import Evaluation
from distill.step import TrainContext, private_random, train_step
from distill.stream import LiveStream, LiveTeacher, Stream, open_stream
from distill.students import (
    ALONE,
    History,
    Student,
    StudentState,
    choose_device,
    make_student_state,
)

RUN_LOCK = "run"
"""Name of the reservation that a run holds in its output folder."""


class TrainResult(NamedTuple):
    """The result of a run: the trained student (its weight average with `ema`) and its scores."""

    student: Student
    history: History


def train(
    config: TrainConfig,
    *,
    stream: Stream | None = None,
    teachers: Sequence[LiveTeacher] = (),
    on_event: Listener | None = None,
) -> TrainResult:
    """Train one student by the settings of a train file; see `train_students`."""
    results = train_students({ALONE: config}, stream=stream, teachers=teachers, on_event=on_event)
    return results[ALONE]


def train_students(
    configs: Mapping[str, TrainConfig],
    *,
    stream: Stream | None = None,
    teachers: Sequence[LiveTeacher] = (),
    on_event: Listener | None = None,
) -> dict[str, TrainResult]:
    """Train several students on one stream, or resume them from their checkpoints.

    Every batch is rendered once, and the logits of every teacher are decoded once, for all
    students. Each student is updated exactly as if it were trained alone, and a resumed student
    exactly as in an uninterrupted run. After the first Ctrl-C or SIGTERM the current step is
    finished and a checkpoint is saved.

    A process that torchrun started (WORLD_SIZE above 1) trains the same students together with the
    others, by its slice of each batch, and writes files on rank 0 only: see `distill.ranks`.

    Args:
        configs: settings by the names of the students. They share one stream, so they may differ
            only in `out` and in the keys of `distill.multi_student.OWN`.
        stream: batches to use instead of the dataset and the caches in `configs`. With several
            processes, the plan of each process's stream has the `rank` and `world` of the process.
        teachers: teachers that run during training instead of recorded logits.
        on_event: called with every event of the run, on rank 0.

    Raises:
        KeyboardInterrupt: a signal stopped the run. The checkpoints contain all steps so far.
        WorkersError: another of several processes ended.
        NonFiniteError: a loss is NaN or infinite. All students stop; the last checkpoints were
            written before that step.
        ConfigError, SpecMismatchError: a checkpoint in `out` belongs to another run, or another
            process is training into `out`.
        KdCacheError: dataset, caches, model and method do not fit each other; see the message.
    """
    shared = refuse_unlike(configs)
    device = choose_device(own_device(shared.device))
    wait_s = max((cache.wait_s for cache in shared.caches), default=0.0)
    with join_ranks(device, wait_s=wait_s) as ranks, ExitStack() as stack:

        def reserve() -> None:
            for config in configs.values():
                stack.enter_context(_only_run_in(config.out))

        ranks.on_first(reserve)
        context, saved = _open_context(configs, device, ranks, stream, teachers)
        return _train_students(configs, context, saved, on_event)


@contextmanager
def _only_run_in(out: str) -> Iterator[None]:
    """Reserves the folder of a run. The reservation ends with the process, also after kill -9.

    Raises:
        ConfigError: another run has reserved it.
    """
    storage, is_new = LocalStorage(out), not Path(out).exists()
    if not storage.begin(RUN_LOCK):
        raise ConfigError(
            f"another run is writing into {out}, and a folder holds one run.",
            hint="Write into another folder with --set out=FOLDER, or wait until that run ends.",
        )
    try:
        yield
    finally:
        storage.end(RUN_LOCK)
        storage.sweep()
        if is_new:
            with suppress(OSError):  # a refused run wrote nothing, and rmdir keeps other folders
                Path(out).rmdir()


def _open_context(
    configs: Mapping[str, TrainConfig],
    device: torch.device,
    ranks: Ranks,
    stream: Stream | None,
    teachers: Sequence[LiveTeacher],
) -> tuple[TrainContext, dict[str, Payload]]:
    """Open what the students share, and their checkpoints, and see that all of it fits."""
    shared = next(iter(configs.values()))
    refuse_on_ranks(configs, ranks)
    outs = {name: config.out for name, config in configs.items()}
    saved = ranks.on_first(lambda: load_checkpoints(outs))
    # Compared before the dataset and the caches are opened, which may take long.
    for name, payload in saved.items():
        refuse_other_config(_path(configs[name]), payload, configs[name].model_dump(mode="json"))
    if stream is None:
        seeds = next((payload["identity"]["seeds"] for payload in saved.values()), None)
        methods = [config.method for config in configs.values()]
        divided = {"rank": ranks.rank, "world": ranks.world}
        stream = open_stream(shared, device=device, seeds=seeds, methods=methods, **divided)
    if teachers:
        stream = LiveStream(stream, teachers)
    refuse_other_stream(stream, ranks)
    return TrainContext(stream, device, NonFiniteCheck(device, ranks), ranks), saved


def _train_students(
    configs: Mapping[str, TrainConfig],
    context: TrainContext,
    saved: Mapping[str, Payload],
    on_event: Listener | None,
) -> dict[str, TrainResult]:
    stream, device, ranks = context.stream, context.device, context.ranks
    shared = next(iter(configs.values()))
    with private_random(device), stop_on_signal() as stop, ExitStack() as stack:
        students = [
            make_student_state(configs[name], stream, device, name=name) for name in configs
        ]
        students = [_synchronize(student, ranks) for student in students]
        _restore(context, students, saved)
        held_out = _open_held_out(shared, stream)
        records: dict[str, Listener] = {}
        ranks.on_first(partial(_open_files, students, records, stack))
        Trainer(context, shared, students, held_out, records, on_event).train_epochs(stop)
    return {student.name: _finish(student, context) for student in students}


def _open_files(
    students: Sequence[StudentState], records: dict[str, Listener], stack: ExitStack
) -> None:
    """Write the settings of each student, and open its metrics files until the stack is closed."""
    for student in students:
        _write_config(student.config)
    for student in students:
        step = student.history.step
        trackers = trackers_of(student.config, step=step)
        files = metrics_files(student.config.out, step=step, trackers=trackers)
        records[student.name] = stack.enter_context(files)


def _synchronize(student: StudentState, ranks: Ranks) -> StudentState:
    """Return the student with the weights of rank 0 and with the history that all ranks use."""
    for model in (student.model, student.kept_model):
        ranks.broadcast_weights(model)
    if student.predictions is None:
        return student
    return replace(student, predictions=ranks.shared_history(student.predictions))


def _restore(
    context: TrainContext, students: Sequence[StudentState], saved: Mapping[str, Payload]
) -> None:
    """Restore the students that have a checkpoint, and refuse checkpoints of other data."""
    for student in students:
        payload = saved.get(student.name)
        if payload is not None:
            refuse_other_rows(
                _path(student.config), payload, identity_of(context, students, student)
            )
            student.restore(payload, context.device)
        if student.predictions is not None:
            steps = context.stream.facts.plan.steps_per_epoch
            student.predictions.prune(student.history.step, steps_per_epoch=steps)
    refuse_apart_peers(students)


def _finish(student: StudentState, context: TrainContext) -> TrainResult:
    config, facts = student.config, context.stream.facts
    trained = Student(student.kept_model.eval(), student.preprocess)
    export = partial(
        export_student,
        config.out,
        trained,
        name=config.student.model,
        num_classes=facts.num_classes,
        view_size=facts.view_size,
        classes=facts.classes,
    )
    context.ranks.on_first(export)
    return TrainResult(trained, student.history)


def _open_held_out(config: TrainConfig, stream: Stream) -> HeldOut | None:
    if config.evaluate is None:
        return None
    return HeldOut(
        config.evaluate,
        num_classes=stream.facts.num_classes,
        view_size=stream.facts.view_size,
        batch_size=config.batch_size,
        workers=config.workers,
        classes=stream.facts.classes,
        rank=stream.facts.plan.rank,
        world=stream.facts.plan.world,
    )


def _path(config: TrainConfig) -> Path:
    return Path(config.out) / CHECKPOINT_NAME


def _write_config(config: TrainConfig) -> None:
    """Write the complete train file, including default values."""
    text = dump_yaml(config.model_dump(mode="json"))
    storage = LocalStorage(config.out)
    storage.put(CONFIG_NAME, text.encode())
    storage.sweep()


class Trainer(NamedTuple):
    """A run of one or several students.

    Attributes:
        context: objects that all students share.
        shared: settings of the first student, used for the keys that all students share.
        students: the students.
        held_out: evaluation set, if any.
        records: for each student, by name, the writer of its metrics files. It is empty on all
            ranks but rank 0.
        on_event: called on rank 0 with the events of all students.
    """

    context: TrainContext
    shared: TrainConfig
    students: Sequence[StudentState]
    held_out: HeldOut | None
    records: Mapping[str, Listener]
    on_event: Listener | None

    def train_epochs(self, stop: StopRequest) -> None:
        """Train from the earliest step that a student has not taken to the last step.

        A student that is ahead because others were added later is skipped until they catch up.
        """
        for student in self.students:
            self._report(student, "start", self._facts(student))
        steps_per_epoch = self._plan.steps_per_epoch
        first = min(student.history.step for student in self.students)
        began, num_views = time.perf_counter(), 0
        batches = self._saved_if_stopped(self.context.stream.batches(first))
        for group in accumulation_groups(batches, self.shared.accumulate, steps_per_epoch):
            begin, end = group[0].cursor.step, group[-1].cursor.step + 1
            students = [each for each in self.students if each.history.step == begin]
            self._update(students, group)
            num_views += self.context.ranks.count_views(self._plan, group)
            if end % steps_per_epoch == 0:
                # Evaluation is excluded from the time of the epoch.
                seconds = time.perf_counter() - began
                timing = {"epoch_s": seconds, "views_per_s": num_views / seconds}
                self._finish_epoch(students, timing)
                began, num_views = time.perf_counter(), 0
            stops = self.context.ranks.any(stop.requested)
            if stops or self._checkpoint_is_due(begin, end):
                self._save(students)
            if stops:
                raise StoppedTogether
        for student in self.students:
            self._report(student, "end", _named_scores(student.history.last))

    def _saved_if_stopped(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches. Where the wait for one is stopped, the steps so far are saved."""
        try:
            yield from batches
        except StoppedWaitingError:
            if self.context.ranks.world == 1:  # others may not have come so far
                self._save([each for each in self.students if each.history.step > 0])
            raise

    @property
    def _plan(self) -> BatchPlan:
        return self.context.stream.facts.plan

    def _update(self, students: Sequence[StudentState], group: Sequence[Batch]) -> None:
        """Set the learning rates, update the students, and report every `log_every` updates."""
        # Rounded up, because the last accumulation group of an epoch may be smaller.
        updates_per_epoch = -(-self._plan.steps_per_epoch // self.shared.accumulate)
        epoch, index = divmod(group[0].cursor.step, self._plan.steps_per_epoch)
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
            num_views = self.context.ranks.count_views(self._plan, group)
            student.history.totals.add(means, num_views)
            student.history.step = group[-1].cursor.step + 1
            if (update + 1) % self.shared.log_every == 0:
                self.context.non_finite.check()
                values = {"lr": student.learning_rate, **means.floats()}
                self._report(student, "step", values, epoch=epoch)

    def _finish_epoch(self, students: Sequence[StudentState], timing: Mapping[str, float]) -> None:
        epoch = students[0].history.step // self._plan.steps_per_epoch
        self.context.non_finite.check()
        for student, evaluation in zip(students, self._evaluate(students, epoch), strict=True):
            scores = _named_scores(evaluation)
            if evaluation is not None:
                student.history.note(evaluation, epoch)
                self._report(student, "evaluation", scores, epoch=epoch)
            totals = student.history.totals
            values: dict[str, Value] = {
                "lr": student.learning_rate,
                **totals.means(),
                **timing,
            }
            values |= scores if self.held_out is not None else {}
            self._report(student, "epoch", values, epoch=epoch)
            totals.clear()

    def _evaluate(
        self, students: Sequence[StudentState], epoch: int
    ) -> Sequence[Evaluation | None]:
        settings = self.shared.evaluate
        is_due = epoch == self.shared.epochs or (settings and epoch % settings.every == 0)
        if self.held_out is None or not is_due:
            return [None] * len(students)
        networks = [Student(student.kept_model, student.preprocess) for student in students]
        # Compiled code would be made again, for batches of another size and for inference.
        compiled = any(student.config.compile for student in students)
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            return evaluate_students(
                networks, self.held_out, device=self.context.device, ranks=self.context.ranks
            )

    def _checkpoint_is_due(self, begin: int, end: int) -> bool:
        every = self.shared.checkpoint_every
        steps = every.steps or self._plan.steps_per_epoch * (every.epochs or 1)
        return end == self._plan.num_steps or end // steps > begin // steps

    def _save(self, students: Sequence[StudentState]) -> None:
        facts = self.context.stream.facts
        self.context.non_finite.check()
        # After this check no file can contain the result of a non-finite loss.
        payloads = {}
        for student in students:
            refuse_non_finite_weights(student.model, student.history.step, student=student.name)
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
        outs = {student.name: student.config.out for student in students}
        # The others wait until it is written: a rank that ends makes torchrun end all of them.
        self.context.ranks.on_first(partial(save_checkpoints, outs, payloads))
        for student in students:
            if student.predictions is not None:
                # Not earlier: if saving fails, the previous checkpoint still needs the older files.
                student.predictions.prune(
                    student.history.step, steps_per_epoch=self._plan.steps_per_epoch
                )
            self._report(student, "checkpoint", {})

    def _report(
        self,
        student: StudentState,
        kind: EventKind,
        values: Mapping[str, Value],
        *,
        epoch: int | None = None,
    ) -> None:
        if student.name not in self.records:
            return
        step = student.history.step
        if epoch is None:
            epoch = step // self._plan.steps_per_epoch
        event = Event(kind, epoch, step, dict(values))
        self.records[student.name](event)
        if self.on_event is not None:
            self.on_event(event._replace(student=student.name))

    def _facts(self, student: StudentState) -> dict[str, Value]:
        held_out = "" if self.held_out is None else self.held_out.left_out
        left_out = "; ".join(filter(None, (self.context.stream.facts.left_out, held_out)))
        return {
            "method": student.settings.name,
            "model": student.config.student.model,
            "num_parameters": sum(p.numel() for p in student.model.parameters()),
            "num_samples": self._plan.num_samples,
            "num_steps": self._plan.num_steps,
            "device": str(self.context.device),
            **({"processes": self._plan.world} if self._plan.world > 1 else {}),
            "torch": torch.__version__,
            **({"not_taken": left_out} if left_out else {}),
            **({"loader": loader} if (loader := self.context.stream.facts.loader) else {}),
            **{name: text for name, text in student.about.items() if text},
        }


def accumulation_groups(
    batches: Iterable[Batch], size: int, steps_per_epoch: int
) -> Iterator[list[Batch]]:
    """Group batches by `size`. The last group of an epoch contains the remaining batches."""
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size or (batch.cursor.step + 1) % steps_per_epoch == 0:
            yield group
            group = []


def identity_of(
    context: TrainContext, students: Sequence[StudentState], student: StudentState
) -> dict[str, Any]:
    """Return a JSON document of everything but its settings that determines a student's steps."""
    identity = context.stream.facts.identity
    if not requirements_of(student.settings).peers:
        return identity
    peers = [each.name for each in students if requirements_of(each.settings).peers]
    return identity | {"peers": peers}


def _named_scores(evaluation: Evaluation | None) -> dict[str, Value]:
    """Name scores `eval_top1` and so on. Without scores the values are None, so that the columns of
    `metrics.csv` stay the same."""
    names = ("top1", "top5", "nll", "ece")
    return {f"eval_{name}": getattr(evaluation, name, None) for name in names}
