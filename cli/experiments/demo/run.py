"""The demo from start to end: a teacher, its recording, a student trained four ways, a comparison.

It is the shipped experiment `demo`, with what is special to it: each student is trained and
measured in a process of its own, one of them with the live teacher beside it, and the losses of
single steps with the live teacher are compared with those from the cache.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError

from cache_service.config import Frozen, dump_yaml, validate_config
from cache_service.datasets import DatasetConfig
from cache_service.errors import NonFiniteError, UntrainedTeacherError
from cache_service.format.canonical import canonical_json, sha256_hex
from cache_service.format.layout import CacheLayout
from cache_service.format.seeds import describe_seeds
from cache_service.rows.reader import open_cache
from cache_service.storage.local import LocalStorage
from cache_service.teacher.settings import TeacherConfig
from cli.experiments.demo.sample_view import SampleView, choose_view
from cli.experiments.experiment_file import (
    Document,
    ExperimentConfig,
    Variant,
    merge_documents,
    read_shipped,
)
from cli.experiments.measure import (
    Measured,
    MeasuringProcesses,
    OnEpoch,
    VariantJob,
    live_teacher,
)
from cli.experiments.runner import (
    OnMessage,
    Recording,
    epoch_seconds,
    record_teachers,
    train_teachers,
)
from distill.checkpoint import CHECKPOINT_NAME
from distill.config import TrainConfig
from distill.finite import NonFiniteCheck
from distill.optim import learning_rate, set_learning_rate
from distill.reporting import read_metrics
from distill.step import TrainContext, private_random, train_step
from distill.stream import LiveStream, open_stream
from distill.students import choose_device, make_student_state

WHERE = "demo"
TEACHER, CACHE, BUILD = "teacher", "cache", "build"
LIVE, CACHED_KD = "live", "kd"
MEASURED_NAME = "measured.json"

THREADS = 1
"""With one thread, the numbers do not depend on how many cores there are."""

TOLERANCE = 1e-3
"""Nats by which a loss may differ when the teacher's logits are rounded to float16."""

Measure = Callable[[VariantJob, OnEpoch], Measured]


class VariantResult(NamedTuple):
    """One variant of the student, and what it gave and cost."""

    name: str
    title: str
    measured: Measured


class Agreement(NamedTuple):
    """Losses of the same steps from the same weights, with the live teacher and from the cache.

    Attributes:
        live, cached: losses, nats.
        tolerance: largest difference that rounding the logits to float16 may cause, nats.
    """

    live: tuple[float, ...]
    cached: tuple[float, ...]
    tolerance: float

    @property
    def max_abs_difference(self) -> float:
        """Largest over all steps, nats."""
        return max(abs(a - b) for a, b in zip(self.live, self.cached, strict=True))

    @property
    def holds(self) -> bool:
        """Whether it is within the tolerance at every step."""
        return self.max_abs_difference <= self.tolerance


class CacheFacts(NamedTuple):
    """The cache.

    Attributes:
        stored_bytes: of all its files.
        seconds: that recording took, over all runs of the demo; None where it was not timed.
    """

    url: str
    fingerprint: str
    views: int
    seeds: str
    scales: tuple[int, ...]
    stored_scales: tuple[int, ...]
    bytes_per_view: int
    stored_bytes: int
    seconds: float | None


class TrainedTeacher(NamedTuple):
    """The teacher that the demo trained.

    Attributes:
        accuracy: on the test images.
        seconds: of its epochs.
    """

    model: str
    accuracy: float
    num_parameters: int
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured.

    Attributes:
        agreement: of single steps.
        live_losses, cached_losses: of the two whole trainings by KD, step by step.
        files: texts of the files it ran, by name.
    """

    out: str
    config: ExperimentConfig
    rows: tuple[VariantResult, ...]
    agreement: Agreement
    live_losses: tuple[float, ...]
    cached_losses: tuple[float, ...]
    teacher: TrainedTeacher
    student_parameters: int
    recording: CacheFacts
    sample: SampleView
    files: dict[str, str]

    @property
    def device(self) -> str:
        """`cpu` or `cuda`."""
        return self.rows[0].measured.device

    def measured(self, name: str) -> Measured:
        """The measurement of one variant."""
        return next(row.measured for row in self.rows if row.name == name)

    def document(self, report: str) -> dict[str, Any]:
        """The table and its context, for `--json`."""
        return {
            "out": self.out,
            "report": report,
            "device": self.device,
            "rows": [
                {
                    "name": row.name,
                    "title": row.title,
                    "accuracy": row.measured.accuracy,
                    "seconds_per_step": row.measured.seconds_per_step,
                    "peak_memory_bytes": row.measured.peak_memory_bytes,
                    "accuracy_by_epoch": list(row.measured.curve),
                }
                for row in self.rows
            ],
            "losses_equal": {
                "steps": len(self.agreement.live),
                "max_abs_difference": self.agreement.max_abs_difference,
                "tolerance": self.agreement.tolerance,
                "holds": self.agreement.holds,
            },
            "teacher": {
                "model": self.teacher.model,
                "accuracy": self.teacher.accuracy,
                "num_parameters": self.teacher.num_parameters,
                "train_seconds": self.teacher.seconds,
            },
            "student": {"num_parameters": self.student_parameters},
            "cache": self.recording._asdict(),
        }


def demo_experiment(out: str, changes: Document | None = None) -> ExperimentConfig:
    """The shipped experiment, with every folder directly in `out`, under the names of its files."""
    document = merge_documents(read_shipped("demo"), changes or {})
    document["out"] = out
    document["teachers"][TEACHER]["out"] = str(Path(out, TEACHER))
    document["recordings"][CACHE]["cache"] = str(Path(out, CACHE))
    for name, entry in document["methods"].items():
        entry["train"] = {"out": str(Path(out, name))}
    return validate_config(ExperimentConfig, document, where=WHERE)


def run_demo(
    out: str,
    *,
    changes: Document | None = None,
    on_message: OnMessage = lambda _: None,
    measure: Measure | None = None,
) -> DemoResult:
    """Do everything that an earlier run into the folder `out` has not finished.

    Args:
        changes: keys of the experiment file that differ.
        measure: trains a student; by default in a process of its own.

    Raises:
        ConfigError, SpecMismatchError: `out` holds a demo of other settings.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    config = demo_experiment(out, changes)
    torch.set_num_threads(THREADS)
    variants = {variant.name: variant for variant in config.variants()}
    jobs = {name: _job(config, variant) for name, variant in variants.items()}
    saved = {name: _saved(job) for name, job in jobs.items()}
    missing = sum(measured is None for measured in saved.values())
    with ExitStack() as stack:
        if measure is None:
            processes = MeasuringProcesses(missing, threads=THREADS)
            measure = stack.enter_context(processes).measure
        model = config.teachers[TEACHER]["student"]["model"]
        on_message(f"1 of 4: training the teacher, {model}, on labels.")
        outcomes = train_teachers(config, where=WHERE, on_message=on_message)
        if outcomes[TEACHER].failure is not None:
            raise NonFiniteError(f"the teacher could not be trained: {outcomes[TEACHER].failure}")
        texts = _write_files(config, variants)  # not before: a folder of other settings is refused
        on_message("2 of 4: recording its logits for every view.")
        recordings = record_teachers(config, outcomes, where=WHERE, on_message=on_message)
        recording = _describe_cache(config, recordings[CACHE])
        on_message(f"3 of 4: training one student {len(jobs)} ways on these views.")
        titles = {name: config.title_of(name) for name in jobs}
        rows = tuple(_train_variants(jobs, saved, titles, measure, on_message))
    on_message("4 of 4: comparing losses, and writing the report.")
    cached, live = jobs[CACHED_KD].train, jobs[LIVE]
    return DemoResult(
        out=out,
        config=config,
        rows=rows,
        agreement=compare_steps(cached, live),
        live_losses=loss_curve(live.train.out),
        cached_losses=loss_curve(cached.out),
        teacher=_describe_teacher(config),
        student_parameters=_num_parameters(cached.out),
        recording=recording,
        sample=choose_view(recording.url, DatasetConfig.model_validate(config.dataset)),
        files=texts,
    )


def _job(config: ExperimentConfig, variant: Variant) -> VariantJob:
    build = config.build_config(CACHE, where=WHERE)
    assert build is not None
    teacher: TeacherConfig | None = build.teacher if variant.name == LIVE else None
    train = config.train_config(variant, 0, where=WHERE)
    return VariantJob(train=train, teacher=teacher, threads=THREADS)


class SavedMeasurement(Frozen):
    """A measurement beside the digest of the job that it is of."""

    job: str
    measured: Measured


def _saved(job: VariantJob) -> Measured | None:
    """The measurement of an earlier run of the demo that finished this job."""
    content = LocalStorage(job.train.out).get(MEASURED_NAME)
    if content is None:
        return None
    try:
        saved = SavedMeasurement.model_validate_json(content)
    except ValidationError:  # of another version of the demo
        return None
    return saved.measured if saved.job == _digest(job) else None


def _digest(job: VariantJob) -> str:
    return sha256_hex(canonical_json(job.model_dump(mode="json")))


def _train_variants(
    jobs: Mapping[str, VariantJob],
    saved: Mapping[str, Measured | None],
    titles: Mapping[str, str],
    measure: Measure,
    on_message: OnMessage,
) -> Iterator[VariantResult]:
    """The student, one variant after the other. One that was interrupted starts over.

    Half of a measurement from before a stop and half from after it would be neither.
    """
    for name, job in jobs.items():
        title, measured = titles[name], saved[name]
        if measured is not None:
            on_message(f"  {title}: {measured.accuracy:.1%} correct, from the run before")
        else:
            storage = LocalStorage(job.train.out)
            storage.delete(CHECKPOINT_NAME)
            measured = measure(job, _epoch_report(title, job.train.epochs, on_message))
            content = SavedMeasurement(job=_digest(job), measured=measured).model_dump_json()
            storage.put(MEASURED_NAME, content.encode())
            storage.sweep()
        yield VariantResult(name, title, measured)


def _epoch_report(title: str, epochs: int, on_message: OnMessage) -> OnEpoch:
    def report(epoch: int, accuracy: float) -> None:
        on_message(f"  {title}: epoch {epoch} of {epochs}, {accuracy:.1%} correct")

    return report


def _write_files(config: ExperimentConfig, variants: Mapping[str, Variant]) -> dict[str, str]:
    """Write every train and build file, so that a reader can run it. Returns texts by file name."""
    documents = {
        TEACHER: config.teacher_document(TEACHER),
        BUILD: config.build_document(CACHE),
        **{name: config.train_document(variant, 0) for name, variant in variants.items()},
    }
    storage, texts = LocalStorage(config.out), {}
    for name, document in documents.items():
        path = f"{name}.yaml"
        body = dump_yaml(_unshared(document))
        texts[path] = f"# {_how_to_run(name, config.out)}\n{body}"
        storage.put(path, texts[path].encode())
    storage.sweep()
    return texts


def _unshared(value: Any) -> Any:
    """The value with no part in it twice, which YAML would write as an anchor."""
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list | tuple) else value


def _how_to_run(name: str, out: str) -> str:
    path = shlex.quote(str(Path(out) / f"{name}.yaml"))
    if name == BUILD:
        return f"kd-cache build {path}"
    if name == LIVE:
        return "kd-cache demo runs this one, with the teacher of build.yaml beside the student."
    return f"kd-cache train {path}"


def _describe_cache(config: ExperimentConfig, recording: Recording) -> CacheFacts:
    if recording.cache is None:
        raise UntrainedTeacherError(str(recording.problem))
    cache, files = open_cache(recording.cache), LocalStorage(recording.cache)
    build = config.build_config(CACHE, where=WHERE)
    assert build is not None
    spec = cache.spec
    return CacheFacts(
        url=cache.url,
        fingerprint=cache.fingerprint,
        views=len(build.seeds) * spec.dataset.num_samples,
        seeds=describe_seeds(build.seeds),
        scales=spec.scales,
        stored_scales=spec.stored_scales,
        bytes_per_view=CacheLayout(spec).row_bytes,
        stored_bytes=sum(files.size(key) or 0 for key in files.list("")),
        seconds=recording.seconds or None,
    )


def _describe_teacher(config: ExperimentConfig) -> TrainedTeacher:
    out = config.teacher_out(TEACHER)
    epochs = [line for line in read_metrics(out) if line["kind"] == "epoch"]
    return TrainedTeacher(
        model=config.teachers[TEACHER]["student"]["model"],
        accuracy=epochs[-1]["eval_top1"],
        num_parameters=_num_parameters(out),
        seconds=epoch_seconds([out]),
    )


def loss_curve(out: str) -> tuple[float, ...]:
    """Losses of the run in a folder, step by step."""
    return tuple(line["loss"] for line in read_metrics(out) if line["kind"] == "step")


def _num_parameters(out: str) -> int:
    """Of the network that was trained into a folder."""
    start = next(line for line in read_metrics(out) if line["kind"] == "start")
    return int(start["num_parameters"])


def compare_steps(cached: TrainConfig, live: VariantJob) -> Agreement:
    """Losses of the first epoch with the live teacher and from the cache, step by step.

    Two whole trainings cannot be compared: two that differ in the last bit of one number drift
    apart. So each step is taken twice from the same state, along the path of the cached training.

    Args:
        cached: train file of the run from the cache.
        live: the same run without caches, and its teacher.
    """
    device = choose_device(cached.device)
    recorded = open_stream(cached, device=device)
    assert live.teacher is not None
    teacher = live_teacher(live.teacher, live.train, device)
    beside = LiveStream(open_stream(live.train, device=device), [teacher])
    watch = NonFiniteCheck(device)
    from_cache, from_live = (
        TrainContext(recorded, device, watch),
        TrainContext(beside, device, watch),
    )
    num_steps = recorded.facts.plan.steps_per_epoch
    losses: list[tuple[float, float]] = []
    with private_random(device):
        student = make_student_state(cached, recorded, device)
        for batch in islice(recorded.batches(0), num_steps):
            rate = learning_rate(
                cached.schedule,
                batch.cursor.step,
                peak=cached.optimizer.lr,
                updates_per_epoch=num_steps,
                epochs=cached.epochs,
            )
            set_learning_rate(student.optimizer, rate)
            twin = copy.deepcopy(student)
            (with_live,) = train_step(from_live, [twin], [batch])
            (with_cache,) = train_step(from_cache, [student], [batch])
            losses.append((with_live.floats()["loss"], with_cache.floats()["loss"]))
    live_losses, cached_losses = zip(*losses, strict=True)
    return Agreement(live_losses, cached_losses, TOLERANCE)
