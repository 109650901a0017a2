"""A distillation from start to end: check, estimate, record, train, evaluate, compare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cache_service.config import dump_yaml
from cache_service.errors import ConfigError, OutOfSpaceError, SpecMismatchError
from cache_service.format.group import ROOT_KEY
from cache_service.format.seeds import describe_seeds
from cache_service.human_format import human_bytes
from cache_service.recording.comparison import check_teacher
from cache_service.recording.context import BuildContext, open_build
from cache_service.recording.plan import make_plan
from cache_service.storage import open_storage
from cache_service.storage.local import LocalStorage
from cache_service.teacher.score import predict_classes, require_trained
from cli.experiments.distill_folder.cost import (
    RecordingCost,
    TrainingCost,
    recording_cost,
    training_cost,
)
from cli.experiments.distill_folder.request import WHERE, Planned, Request, plan_request
from cli.experiments.experiment_check import check_experiment
from cli.experiments.experiment_file import Document, ExperimentConfig
from cli.experiments.result_table import Measured, Row, Table, figure_cells, grid
from cli.experiments.runner import (
    ExperimentResult,
    OnMessage,
    Recording,
    record_opened,
    train_teachers,
    train_variants,
    write_results,
)
from distill.checkpoint import CHECKPOINT_NAME, load_checkpoint, refuse_other_config
from distill.config import TrainConfig
from distill.evaluate import HeldOut
from distill.export import STUDENT_NAME

HEADER = """\
# Written by kd-cache distill, anew each time that it runs; copy this file to change it.
# By hand: kd-cache {command} {path}
"""

EVALUATION_NAME = "evaluation.json"
"""In the output folder: on which images everything in it is evaluated."""

SCORE_NAME = "teacher.json"
"""In the folder of a recording: the teacher's accuracy on the images for evaluation."""


class Cost(NamedTuple):
    """What is left to do."""

    recording: RecordingCost
    training: TrainingCost


class Distilled(NamedTuple):
    """The end of the command.

    Attributes:
        table: the comparison; None of a dry run.
        report, files, students: paths.
        cost: as it was estimated.
    """

    table: Table | None
    report: str | None
    files: tuple[str, ...]
    students: tuple[str, ...]
    cost: Cost

    @property
    def text(self) -> str:
        """For people."""
        if self.table is None:
            return "Nothing was recorded or trained."
        lines = [*grid(*figure_cells(self.table)), "", f"Report: {self.report}"]
        lines += [f"Weights: {path}" for path in self.students]
        lines += [f"By hand: {path}" for path in self.files]
        return "\n".join(lines)

    def document(self) -> dict[str, Any]:
        """As JSON."""
        table = {} if self.table is None else self.table.document()
        return table | {
            "cost": {name: part._asdict() for name, part in self.cost._asdict().items()},
            "written": {"report": self.report, "students": self.students, "files": self.files},
        }


def run_distill(request: Request, *, dry_run: bool, on_message: OnMessage) -> Distilled:
    """Do what is not done yet.

    Raises:
        KdCacheError: one line; a mistake is reported before anything is recorded or trained.
        KeyboardInterrupt: stopped; the same call goes on from there.
    """
    planned = plan_request(request)
    config = planned.config
    check_experiment(config, where=WHERE)
    _refuse_other_runs(planned)
    _refuse_other_evaluation(planned)
    on_message(f"images   {_describe_images(planned)}")
    opened = _open_teacher(planned)
    on_message(f"teacher  {_describe_teacher(planned, opened)}")
    cost = _estimate(planned, opened, on_message)
    if dry_run:
        return Distilled(None, None, (), (), cost)
    files = _write_files(planned)
    teachers = train_teachers(config, where=WHERE, on_message=on_message)
    for outcome in teachers.values():
        if outcome.failure is not None:
            raise ConfigError(
                f"the teacher did not learn: {outcome.failure}",
                hint="Lower its learning rate: --set train.optimizer.lr=1.0e-4.",
            )
    if teachers:
        opened = _open_checked(planned)
    seconds = record_opened(opened, title=f"{WHERE}: recording", on_message=on_message)
    accuracy = _teacher_accuracy(planned, opened)
    del opened  # students train without a teacher in memory
    recordings = {planned.teacher: Recording(config.cache_of(planned.teacher), seconds)}
    runs = train_variants(config, recordings, where=WHERE, on_message=on_message)
    result = ExperimentResult(config, teachers, recordings, runs)
    table = _table(request, planned, result, accuracy)
    name = f"{planned.student}-from-{planned.teacher}"
    written = write_results(table, result.curves(), out=config.out, name=name)
    students = [each.out for each in _train_configs(config)]
    return Distilled(
        table,
        written.paths["report"],
        files,
        tuple(str(Path(out, STUDENT_NAME)) for out in students),
        cost,
    )


def _refuse_other_runs(planned: Planned) -> None:
    """Refuse folders of runs with other settings, before the recording is extended for them."""
    config = planned.config
    teachers = [config.teacher_config(name, where=WHERE) for name in config.teachers]
    for run in (*teachers, *_train_configs(config)):
        saved = load_checkpoint(run.out)
        if saved is None:
            continue
        try:
            refuse_other_config(Path(run.out, CHECKPOINT_NAME), saved, run.model_dump(mode="json"))
        except ConfigError as error:
            raise ConfigError(
                error.message,
                hint="Choose another folder with --out."
                if run in teachers
                else "To train it beside the first one from the same recording, give it a --name.",
            ) from error


def _evaluation_of(planned: Planned) -> dict[str, Any]:
    """What decides which views the figures of the table are of."""
    evaluate = next(_train_configs(planned.config)).evaluate
    assert evaluate is not None
    return {
        "images": planned.held_out.id.sha256,
        **evaluate.model_dump(mode="json", include={"augment"}),
    }


def _refuse_other_evaluation(planned: Planned) -> None:
    """Refuse a folder whose students were evaluated on other images: figures would not compare."""
    before = LocalStorage(planned.config.out).get(EVALUATION_NAME)
    if before is not None and json.loads(before) != _evaluation_of(planned):
        raise ConfigError(
            f"the images for evaluation ({planned.division}) are not those on which what lies in "
            f"{planned.config.out} was evaluated, so the figures would not compare.",
            hint="Choose another folder with --out.",
        )


def _describe_images(planned: Planned) -> str:
    images, augment = planned.images, planned.config.augment or {}
    views = augment.get("preset") or augment.get("callable")
    if views is None:
        views = ", ".join(each["op"] for each in augment["ops"])
    left_out = "; ".join(
        dict.fromkeys(each.left_out for each in (images, planned.held_out) if each.left_out)
    )
    return (
        f"{len(images):,} in {images.id.num_classes} classes to learn from, "
        f"{len(planned.held_out):,} for evaluation: {planned.division}"
        + (f"; not taken: {left_out}" if left_out else "")
        + f"; views of {augment['size']} px by {views}"
    )


def _describe_teacher(planned: Planned, opened: BuildContext) -> str:
    config, model = planned.config, opened.config.teacher.model
    if opened.config.teacher.checkpoint or not config.teachers:
        return f"{model}, {opened.teacher.weights_from}"
    train = config.teacher_config(planned.teacher, where=WHERE)
    cost = training_cost(
        [train],
        num_samples=len(planned.images),
        num_classes=planned.images.id.num_classes,
    )
    return f"{model}, to be trained first: {cost.text}"


def _open_teacher(planned: Planned) -> BuildContext:
    """The teacher, checked and scored; one that is to be trained first is opened untrained."""
    config = planned.config
    if config.teachers and not Path(config.teacher_out(planned.teacher), STUDENT_NAME).exists():
        document = config.build_document(planned.teacher)
        teacher = {key: value for key, value in document["teacher"].items() if key != "checkpoint"}
        build = config.build_config(planned.teacher, where=WHERE)
        assert build is not None
        untrained = build.teacher.model_validate({**teacher, "allow_untrained": True})
        return open_build(build.model_copy(update={"teacher": untrained}))
    return _open_checked(planned)


def _open_checked(planned: Planned) -> BuildContext:
    """The teacher; refused if it does not know the classes, or is not the recorded one."""
    build = planned.config.build_config(planned.teacher, where=WHERE)
    assert build is not None
    opened = open_build(build)
    outputs, classes = opened.spec.teacher.num_classes, opened.dataset.id.num_classes
    if outputs != classes:
        raise ConfigError(
            f"teacher {build.teacher.model} answers {outputs} classes, and the images have "
            f"{classes}.",
            hint="Say which of its outputs they are by --set teacher.classes=...",
        )
    try:
        if open_storage(build.cache).get(ROOT_KEY) is None:
            make_plan(opened)
            require_trained(opened.score(), build.teacher)
        else:
            check_teacher(opened)
    except SpecMismatchError as error:
        raise SpecMismatchError(
            error.message, hint=f"{error.hint} Or choose another folder with --out.".strip()
        ) from error
    return opened


def _estimate(planned: Planned, opened: BuildContext, on_message: OnMessage) -> Cost:
    """Bytes and time, and tell them."""
    config = planned.config
    recording = recording_cost(opened)
    build, runs = opened.config, list(_train_configs(config))
    _refuse_full_disk(build.cache, recording)
    with_views = [run.model_copy(update={"augment": build.augment}) for run in runs]
    num_samples, num_classes = len(planned.images), planned.images.id.num_classes
    training = training_cost(
        with_views,
        num_samples=num_samples,
        num_classes=num_classes,
        render_rows_per_s=recording.render_rows_per_s,
    )
    on_message(
        f"record   {len(build.seeds)} epochs ({describe_seeds(build.seeds)}): {recording.text}"
    )
    unused = len(build.seeds) - runs[0].epochs
    if unused > 0:
        on_message(f"         {unused} of them are not used by {runs[0].epochs} training epochs")
    on_message(f"train    {len(runs)} x {planned.student}: {training.text}")
    on_message(f"files    {config.out}")
    return Cost(recording, training)


def _refuse_full_disk(cache: str, cost: RecordingCost) -> None:
    folder = next(each for each in Path(cache).parents if each.is_dir())
    free = shutil.disk_usage(folder).free
    pending = cost.num_bytes * cost.rows_pending // cost.rows
    if pending > free:
        raise OutOfSpaceError(
            f"the recording takes about {human_bytes(pending)}, and {folder} has "
            f"{human_bytes(free)} left.",
            hint="Choose another folder with --out, fewer epochs with --seeds, or --set "
            "codec.kind=int8.",
        )


def _train_configs(config: ExperimentConfig) -> Iterator[TrainConfig]:
    for variant in config.variants():
        for seed in range(config.runs):
            yield config.train_config(variant, seed, where=WHERE)


def _write_files(planned: Planned) -> tuple[str, ...]:
    """Write the build and train files of all parts. Returns their paths."""
    storage = LocalStorage(planned.config.out)
    paths = []
    for name, command, document in _documents(planned):
        path = str(Path(planned.config.out, name))
        header = HEADER.format(command=command, path=path)
        storage.put(name, f"{header}{dump_yaml(document)}".encode())
        paths.append(path)
    storage.put(EVALUATION_NAME, json.dumps(_evaluation_of(planned)).encode())
    storage.sweep()
    return tuple(paths)


def _documents(planned: Planned) -> Iterator[tuple[str, str, Document]]:
    """Name, command and content of each file."""
    config = planned.config
    for name in config.teachers:
        yield f"{name}.teacher.yaml", "train", config.teacher_document(name)
    yield f"{planned.teacher}.build.yaml", "build", config.build_document(planned.teacher)
    for variant in config.variants():
        for seed in range(config.runs):
            suffix = f"-seed-{seed}" if config.runs > 1 else ""
            name = f"{planned.student}-{variant.method}{suffix}.train.yaml"
            yield name, "train", config.train_document(variant, seed)


def _teacher_accuracy(planned: Planned, opened: BuildContext) -> float:
    """Top-1 accuracy on the images for evaluation, %; measured once per recording and images."""
    train = next(_train_configs(planned.config))
    assert train.evaluate is not None
    held_out = HeldOut(
        train.evaluate,
        num_classes=opened.dataset.id.num_classes,
        view_size=opened.config.augment.size,
        batch_size=opened.config.batch_size,
        workers=train.workers,
        classes=opened.dataset.classes,
    )
    key = {"fingerprint": opened.spec.fingerprint, **_evaluation_of(planned)}
    storage = LocalStorage(str(Path(opened.config.cache).parent))
    known: Mapping[str, Any] = json.loads(storage.get(SCORE_NAME) or b"{}")
    if key.items() <= known.items():
        return float(known["accuracy"])
    num_right = 0
    for batch in held_out:
        predicted_B = predict_classes(opened.teacher, batch.images_BHW3)
        num_right += int((predicted_B == batch.labels_B.numpy()).sum())
    accuracy = round(100 * num_right / len(held_out.images), 4)
    storage.put(SCORE_NAME, json.dumps({**key, "accuracy": accuracy}).encode())
    storage.sweep()
    return accuracy


def _table(request: Request, planned: Planned, result: ExperimentResult, accuracy: float) -> Table:
    """The comparison; a teacher that was not trained here has a row with its accuracy."""
    rows = tuple(result.row(variant.name) for variant in planned.config.variants())
    teacher = Row(
        what=f"teacher {request.teacher}", published=None, runs=(Measured(seed=0, last=accuracy),)
    )
    return result.table(
        name="distill",
        command=request.command,
        quick=False,
        rows=(teacher, *rows),
        notes=(f"Images: {_describe_images(planned)}.",),
    )
