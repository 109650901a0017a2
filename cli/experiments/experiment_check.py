"""Checks that run before anything is trained: files, datasets, caches, networks and methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from cache_service.datasets import ImageDataset, open_dataset
from cache_service.format.recipe import Recipe
from cache_service.models.features import check_cells
from cache_service.recording.build_config import BuildConfig
from cli.experiments.experiment_file import ExperimentConfig
from distill.config import TrainConfig
from distill.data import load_cache, recorded_seeds
from distill.methods import RunFacts, TeacherFacts, method_of
from distill.replay import Replay
from distill.stream import recorded_facts
from distill.students import Student, choose_device, make_student


class PlannedTeacher(NamedTuple):
    """A teacher of a student that is to be checked.

    Attributes:
        name: for messages.
        cache: where its recording is, or will be.
        build: the file that will record it; None where it is recorded already.
    """

    name: str
    cache: str
    build: BuildConfig | None


def check_experiment(config: ExperimentConfig, *, where: str) -> None:
    """Validate every file of an experiment and try every method, before anything is trained.

    Raises:
        ConfigError, UnsupportedError, DatasetError: one line; nothing was written.
        NotACacheError, SpecMismatchError, RowsNotBuiltError: a cache that is recorded already does
            not suit the students.
    """
    for name in config.teachers:
        train = config.teacher_config(name, where=where)
        choose_device(train.device)
        open_dataset(train.dataset)
    planned = {
        name: PlannedTeacher(name, config.cache_of(name), config.build_config(name, where=where))
        for name in config.recordings
    }
    students = []
    for variant in config.variants():
        configs = [config.train_config(variant, seed, where=where) for seed in range(config.runs)]
        teachers = tuple(planned[name] for name in config.recordings_of(variant))
        students.append((configs[0], teachers))
    check_students(students)


def check_students(
    students: Iterable[tuple[TrainConfig, tuple[PlannedTeacher, ...]]],
    *,
    recorded_like: BuildConfig | None = None,
) -> None:
    """Make every student once and try its method on its teachers.

    Args:
        students: train files, each with its teachers.
        recorded_like: a build file by which the students are recorded in their turn.

    Raises:
        KdCacheError: see `check_experiment`.
    """
    check = _StudentCheck()
    for config, teachers in students:
        check.run(config, teachers, recorded_like)


class _StudentCheck:
    """Opens datasets and caches, and makes networks, once for all students."""

    def __init__(self) -> None:
        self._datasets: dict[str, ImageDataset] = {}
        self._students: dict[str, Student] = {}
        self._replays: set[tuple[str, ...]] = set()

    def run(
        self,
        config: TrainConfig,
        teachers: tuple[PlannedTeacher, ...],
        recorded_like: BuildConfig | None,
    ) -> None:
        choose_device(config.device)
        images = self._open(config)
        caches = {each.cache: load_cache(each.cache) for each in teachers if each.build is None}
        builds = (recorded_like, *(each.build for each in teachers))
        recipe = _recipe_of(config, next((each for each in builds if each is not None), None))
        recorded = tuple(caches.values())
        if recorded:
            Replay(images, recorded, recipe=recipe)  # refuses another dataset or recipe
            recorded_seeds(recorded, config.seeds)
            recipe = recipe or recorded[0].spec.recipe
        assert recipe is not None
        student = self._make(config, images, recipe)
        if recorded_like is not None and recorded_like.scales != (1,):
            check_cells(
                student.model, student.preprocess.size, channels=student.preprocess.channels
            )
        num_classes = images.id.num_classes
        facts = tuple(
            recorded_facts(caches[each.cache])
            if each.build is None
            else TeacherFacts(
                scales=each.build.scales,
                num_classes=num_classes,
                pooling=each.build.teacher.pooling,
                origin=each.name,
                drops_classes=each.build.codec.drops_classes,
            )
            for each in teachers
        )
        run_facts = RunFacts(
            facts,
            student.model,
            num_classes,
            student.preprocess.size,
            mixes=bool(recipe.mixing),
            channels=student.preprocess.channels,
        )
        method_of(config.method).check(config.method, run_facts)

    def _open(self, config: TrainConfig) -> ImageDataset:
        key = config.dataset.model_dump_json()
        if key not in self._datasets:
            self._datasets[key] = open_dataset(config.dataset)
        return self._datasets[key]

    def _make(self, config: TrainConfig, images: ImageDataset, recipe: Recipe) -> Student:
        """On the CPU. Only the newest is kept: most are alike, and a network may be large."""
        key = f"{config.student.model_dump_json()} {recipe.size} {images.id.num_classes}"
        if key not in self._students:
            self._students = {
                key: make_student(
                    config.student,
                    num_classes=images.id.num_classes,
                    view_size=recipe.size,
                    teacher=None,
                    seed=config.seed,
                )
            }
        return self._students[key]


def _recipe_of(config: TrainConfig, build: BuildConfig | None) -> Recipe | None:
    """What makes the views; None where only a cache that is recorded already says it."""
    if config.augment is not None:
        return config.augment.recipe()
    return build.augment.recipe() if build is not None else None
