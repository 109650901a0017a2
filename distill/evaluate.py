"""Evaluates students: accuracy, calibration and agreement with the teacher.

Shape letters: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.datasets.dataset import show_names
from cache_service.errors import ConfigError
from cache_service.format.recipe import AugmentConfig
from cache_service.format.spec import Preprocess
from cache_service.models.preprocess import prepare_views
from distill.batches import Batch, BatchPlan
from distill.checkpoint import EXPECTED_FILES, Payload, load_checkpoint
from distill.config import CacheConfig, EvaluateConfig, TrainConfig
from distill.export import load_exported
from distill.losses import majority_labels
from distill.ranks import ONE_PROCESS, Ranks
from distill.replay import Replay
from distill.scores import Evaluation, Tally
from distill.stream import ReplayedStream, StreamFacts, open_stream, train_loader
from distill.students import Student, choose_device, restore_student

__all__ = ["Evaluation", "HeldOut", "evaluate", "evaluate_checkpoint", "evaluate_students"]

MAX_KEPT_BYTES = 256 * 2**20
"""Rendered evaluation sets up to this size stay in memory between epochs (CIFAR's takes 30 MB)."""


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    preprocess: Preprocess,
    *,
    device: torch.device | str = "cpu",
    teach: Callable[[Batch], Tensor] | None = None,
) -> Evaluation:
    """Evaluate a model. Its training mode is restored at the end.

    Args:
        model: network on `device` that returns logits [B, C].
        batches: views and labels, each view once.
        preprocess: preprocessing of the model's input.
        device: device of the model.
        teach: function that returns the teacher's logits [B, C] of a batch, to measure agreement.

    Raises:
        ConfigError: there are no views.
    """
    (evaluation,) = evaluate_students(
        [Student(model, preprocess)], batches, device=device, teach=teach
    )
    return evaluation


@torch.inference_mode()
def evaluate_students(
    students: Sequence[Student],
    batches: Iterable[Batch],
    *,
    device: torch.device | str = "cpu",
    teach: Callable[[Batch], Tensor] | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> list[Evaluation]:
    """Evaluate several students on the same views, which are rendered once. See `evaluate`.

    Each of several ranks evaluates the batches that it is given, and returns the scores over the
    batches of all ranks.
    """
    tallies = [Tally(torch.device(device)) for _ in students]
    was_training = [student.model.training for student in students]
    for student in students:
        student.model.eval()
    try:
        for batch in batches:
            on_device = batch.to(str(device))
            teacher_BC = None if teach is None else teach(on_device)
            for student, tally in zip(students, tallies, strict=True):
                images = prepare_views(on_device.images_BHW3, student.preprocess, device=device)
                logits_BC = student.model(images).float()
                tally.add(logits_BC, majority_labels(*on_device[1:4]))
                if teacher_BC is not None:
                    tally.add_agreement(logits_BC, teacher_BC)
    finally:
        for student, before in zip(students, was_training, strict=True):
            student.model.train(before)
    for tally in tallies:
        tally.add_up(ranks.sum_over_ranks)
    return [tally.evaluation() for tally in tallies]


class HeldOut:
    """The batches of an evaluation set. Each iteration yields the same batches.

    The batches are divided among `world` ranks. A batch of one rank has 1 / `world` of `batch_size`
    views, rounded up.

    Attributes:
        left_out: description of files beside the samples that were not taken; may be empty.
        images: the evaluation set.

    Raises:
        ConfigError: the evaluation set has a class that the student does not know, or, for classes
            without names, the numbers of classes differ.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        *,
        num_classes: int,
        view_size: int,
        batch_size: int,
        workers: int,
        classes: Sequence[str] = (),
        rank: int = 0,
        world: int = 1,
    ) -> None:
        images = open_dataset(config.dataset, class_names=classes)
        if images.id.num_classes != num_classes:
            raise ConfigError(
                f"evaluation dataset {config.dataset.name} {config.dataset.split} has "
                f"{images.id.num_classes} classes, but the student has {num_classes}."
            )
        self.left_out = images.left_out
        augment = config.augment or AugmentConfig(preset="none", size=view_size)
        self.images = images
        self._replay = Replay(images, [], recipe=augment.recipe())
        per_rank = -(-(config.batch_size or batch_size) // world)
        self._plan = BatchPlan(len(images), per_rank, (0,), 1)
        self._steps = range(rank, self._plan.num_steps, world)
        self._workers = workers
        self._is_small = len(images) * augment.size**2 * 3 <= MAX_KEPT_BYTES
        self._rendered: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        if self._rendered:
            yield from self._rendered
            return
        batches = []
        for batch in train_loader(
            self._replay, self._plan, steps=self._steps, workers=self._workers
        ):
            if self._is_small:
                batches.append(batch)
            yield batch
        # Assigned only after the last batch: an iteration that stops early must not truncate it.
        self._rendered = batches


def evaluate_checkpoint(
    path: str | Path,
    *,
    dataset: DatasetConfig | None = None,
    cache: str | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> Evaluation:
    """Evaluate the student of a checkpoint. Uses the average of its weights (EMA) if it has one.

    Args:
        path: `checkpoint.pt`, the folder of the run, or `student.safetensors` in that folder.
        dataset: evaluation set; by default that of the run.
        cache: evaluate on the views of this cache instead and measure agreement with its teacher.
            `dataset` is then the dataset of its images, by default that of the run.
        seed: recorded epoch of the cache; by default its first complete one.
        batch_size: views per forward pass; by default that of the run.
        device: device name as in a train file.
        workers: number of loader processes; by default that of the run.

    Raises:
        ConfigError: there is no checkpoint at `path`, or no evaluation set is known.
        CorruptError: the file is not a checkpoint.
    """
    exported = Path(path).suffix == ".safetensors"
    payload = load_exported(path) if exported else load_checkpoint(path)
    if payload is None:
        raise ConfigError(f"no checkpoint at {path}.", hint=EXPECTED_FILES)
    where = choose_device(device)
    config = _train_config(payload, batch_size=batch_size, workers=workers)
    student = restore_student(payload, config.student)
    student.model.to(where)
    if cache is not None:
        recorded = _on_recorded_views(config, dataset=dataset, cache=cache, seed=seed)
        stream = open_stream(recorded, device=where)
        _refuse_other_classes(payload, stream.facts, cache)
        return _score_beside_teacher(stream, student, where)
    evaluation_set = config.evaluate if dataset is None else EvaluateConfig(dataset=dataset)
    if evaluation_set is None:
        raise ConfigError(
            f"{path} does not say what to evaluate on: its train file has no `evaluate`.",
            hint="Name a dataset or a cache.",
        )
    held_out = HeldOut(
        evaluation_set,
        num_classes=payload["num_classes"],
        view_size=payload["view_size"],
        batch_size=config.batch_size,
        workers=config.workers,
        classes=payload.get("classes", ()),
    )
    return evaluate(student.model, held_out, student.preprocess, device=where)


def _refuse_other_classes(payload: Payload, facts: StreamFacts, cache: str) -> None:
    learned, recorded = tuple(payload.get("classes", ())), facts.classes
    if facts.num_classes != payload["num_classes"] or (
        learned and recorded and learned != recorded
    ):
        raise ConfigError(
            f"{cache} was recorded of {facts.num_classes} classes ({show_names(recorded)}), but "
            f"the student learned {payload['num_classes']} ({show_names(learned)}).",
            hint="Evaluate it on a cache of its own classes in their order.",
        )


def _score_beside_teacher(
    stream: ReplayedStream, student: Student, device: torch.device
) -> Evaluation:
    return evaluate(
        student.model,
        stream.batches(0),
        student.preprocess,
        device=device,
        # Cell 0 is the whole image.
        teach=lambda batch: stream.teacher_logits(batch, temperature=1.0, cache=0)[:, 0],
    )


def _train_config(payload: Payload, **changes: int | None) -> TrainConfig:
    given = {name: value for name, value in changes.items() if value is not None}
    return TrainConfig.model_validate(payload["config"] | given)


def _on_recorded_views(
    config: TrainConfig, *, dataset: DatasetConfig | None, cache: str, seed: int | None
) -> TrainConfig:
    """Return the settings of the run, changed to read one recorded epoch of a cache."""
    return config.model_copy(
        update={
            "dataset": dataset or config.dataset,
            "caches": (CacheConfig(url=cache),),
            "augment": None,
            # `device` would fail for a recipe that cannot be rendered on the device.
            "loader": "auto" if config.loader == "device" else config.loader,
            "seeds": None if seed is None else (seed,),
            "epochs": 1,
        }
    )
