"""What is wrong with a cycle file is said before anything is trained, for its last round too."""

from __future__ import annotations

from cache_service.datasets import open_dataset
from cache_service.models.features import check_cells
from cache_service.recording.config import BuildConfig
from cache_service.remote.source import RowSource
from cli.experiments.cycle.rounds import Plan, Source
from distill.config import TrainConfig
from distill.data import Replay
from distill.methods import RunFacts, TeacherFacts, method_of
from distill.sources import load_cache, recorded_seeds
from distill.stream import recorded_facts
from distill.students import Student, choose_device, make_student


def check_cycle(plan: Plan) -> None:
    """Validate every file of every round, and try every method on every number of teachers.

    Raises:
        ConfigError, UnsupportedError, DatasetError: one line; nothing was written.
        NotACacheError, SpecMismatchError, RowsNotBuiltError: of a recorded cache that cannot teach
            what the build file says.
    """
    sources = plan.first_sources()
    first = plan.make_round(1, sources)
    for label in plan.labels:
        plan.train_config(first, label)
    # The student of a round is recorded like a teacher, so some such file is always there.
    build = plan.build_config(plan.next_source(1, plan.labels[0]))
    rounds = []
    for number in range(1, plan.config.rounds + 1):
        rounds.append(plan.make_round(number, sources))
        sources = (*sources, plan.next_source(number, plan.labels[0]))
    for source in sources:
        if source.build is not None:
            plan.build_config(source)
    students = [
        (round_, plan.train_config(round_, label)) for round_ in rounds for label in plan.labels
    ]
    choose_device(students[0][1].device)
    images = open_dataset(build.dataset)
    num_classes = images.id.num_classes
    given = {each.cache: load_cache(each.cache) for each in sources if each.build is None}
    Replay(images, tuple(given.values()), recipe=build.augment.recipe())  # refuses another recipe
    if given:
        recorded_seeds(tuple(given.values()), build.seeds)
    mixes = bool(build.augment.recipe().mixing)
    made: dict[str, Student] = {}
    for round_, config in students:
        named = config.student.model_dump_json()  # alike in most rounds, and may be large
        if named not in made:
            made = {named: _make_student(config, build, num_classes)}
        facts = tuple(
            _facts(source, given.get(source.cache), build, num_classes) for source in round_.sources
        )
        student = made[named]
        method_of(config.method).check(
            config.method,
            RunFacts(facts, student.model, num_classes, student.preprocess.size, mixes),
        )


def _make_student(config: TrainConfig, build: BuildConfig, num_classes: int) -> Student:
    """On the CPU; refused where it could not be recorded at the scales of its teachers."""
    student = make_student(
        config.student,
        num_classes=num_classes,
        view_size=build.augment.size,
        teacher=None,
        seed=config.seed,
    )
    if build.scales != (1,):
        check_cells(student.model, student.preprocess.size)
    return student


def _facts(
    source: Source, cache: RowSource | None, build: BuildConfig, num_classes: int
) -> TeacherFacts:
    """Of a recorded cache what it says itself; of one to come, what the build file says."""
    if cache is not None:
        return recorded_facts(cache)
    return TeacherFacts(
        scales=build.scales, num_classes=num_classes, origin=source.name, codec=build.codec.kind
    )
