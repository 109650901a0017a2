"""`sdd-cifar100`: students of one teacher by KD, DKD, NKD and their scale decoupled forms.

Each pair of a teacher and a student is an experiment of its own: the shipped file with the pair's
networks, scales and weights.
Teachers and recordings lie in folders that all pairs share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache_service.errors import ConfigError
from cli.experiments.experiment_file import Document, ExperimentConfig, Figure
from cli.experiments.html_report import Curve
from cli.experiments.reproduce.shipped import Made, Options, shipped_document, shipped_experiment
from cli.experiments.result_table import Goal, Row, Table
from cli.experiments.runner import ExperimentResult, run_experiment

FORMS = {"kd": "sd-kd", "dkd": "sd-dkd", "nkd": "sd-nkd"}
"""Each method and its scale decoupled form."""

METHODS = ("ce", *FORMS, *FORMS.values())

LIGHT_LR = 0.01
"""Learning rate of ShuffleNet and MobileNet students."""

WANTED_NEAR = 0.7
"""Points by which runs of the published code differ from its own table."""

MODELS = {
    "resnet32x4": "resnet32x4",
    "resnet8x4": "resnet8x4",
    "wrn_40_2": "wrn_40_2",
    "wrn_16_2": "wrn_16_2",
    "ResNet50": "cifar_resnet50",
    "vgg13": "cifar_vgg13",
    "vgg8": "cifar_vgg8",
    "ShuffleNetV1": "cifar_shufflenetv1",
    "ShuffleNetV2": "cifar_shufflenetv2",
    "MobileNetV2": "cifar_mobilenetv2",
}
"""This project's names of the paper's networks."""

Published = Figure | tuple[Figure, Figure] | None

COLUMNS = ("teacher", *METHODS)
TABLE: dict[str, tuple[Published, ...]] = {
    "resnet32x4:resnet8x4": (79.42, 72.5, 73.33, 76.32, None, (75.3, 75.6), None, (76.3, 76.5)),
    "resnet32x4:ShuffleNetV1": (79.42, 70.5, 74.07, 76.45, 75.31, 76.3, 77.3, 76.34),
    "resnet32x4:ShuffleNetV2": (79.42, 71.82, 74.45, 77.07, 76.26, 76.67, 78.05, 77.07),
    "wrn_40_2:ShuffleNetV1": (75.61, 70.5, 74.83, 76.7, 75.96, 76.65, 77.21, 76.81),
    "ResNet50:MobileNetV2": (79.34, 64.6, 67.35, 70.35, 69.39, 69.55, 71.36, 70.25),
    "ResNet50:vgg8": (79.34, 70.36, 73.81, 75.34, 74.01, 74.89, 75.86, 74.62),
    "vgg13:MobileNetV2": (74.64, 64.6, 67.37, 69.71, 68.72, 68.79, 70.25, 69.5),
    "vgg13:vgg8": (74.64, 70.36, 72.98, 74.68, None, (73.4, 73.5), (74.3, 74.5), (73.8, 74.0)),
    "wrn_40_2:wrn_16_2": (75.61, 73.26, 74.92, 76.23, None, None, None, None),
}
"""Top-1 accuracy, %, by pair: of the teacher, then by method."""

LIKE_PAIRS = ("resnet32x4:resnet8x4", "vgg13:vgg8", "wrn_40_2:wrn_16_2")
"""Pairs of like architectures, which the paper trains with scales 1 and 2 only."""

NKD_WITHOUT_4 = ("ResNet50:vgg8",)
"""Pairs of unlike architectures whose SD-NKD was run without scale 4, by the published commands."""

USUAL = ("resnet32x4:resnet8x4", "resnet32x4:ShuffleNetV2", "wrn_40_2:ShuffleNetV1")


class Pair(NamedTuple):
    """A teacher and a student of the paper.

    Attributes:
        title: as the paper writes it.
        teacher, student: this project's names.
        scales: 1 and 2 for like architectures, also 4 for unlike ones, even where a map is smaller
            than the grid and its pixels repeat: the teacher's 16 cells do not.
        nkd_scales: those of SD-NKD.
        beta: of DKD and its scale decoupled form; gamma of SD-NKD.
        lr: learning rate of the student where it is not the file's.
        published: top-1 accuracy, %, of the teacher and by method.
    """

    title: str
    teacher: str
    student: str
    scales: tuple[int, ...]
    nkd_scales: tuple[int, ...]
    beta: float
    lr: float | None
    published: dict[str, Published]

    @property
    def folder(self) -> str:
        """Of the students' runs."""
        return f"{self.teacher}-{self.student}"


def find_pair(written: str) -> Pair:
    """The pair of `TEACHER:STUDENT`, by the paper's names or this project's, in any case.

    Raises:
        ConfigError: there is none; lists those there are.
    """
    known = {_plain(name): name for name in TABLE}
    if _plain(written) not in known:
        raise ConfigError(f"there is no pair {written!r}.", hint=f"There are {', '.join(TABLE)}.")
    name = known[_plain(written)]
    teacher, student = name.split(":")
    scales = (1, 2) if name in LIKE_PAIRS else (1, 2, 4)
    figures = zip(COLUMNS, TABLE[name], strict=True)
    return Pair(
        title=name.replace(":", " -> "),
        teacher=MODELS[teacher],
        student=MODELS[student],
        scales=scales,
        nkd_scales=(1, 2) if name in NKD_WITHOUT_4 else scales,
        beta=6.0 if teacher == "vgg13" or name == "wrn_40_2:wrn_16_2" else 8.0,
        lr=LIGHT_LR if "Net" in student else None,
        published={column: figure for column, figure in figures if figure is not None},
    )


def refuse_unknown_pairs(written: Sequence[str]) -> None:
    """Refuse pairs that the paper does not have, before anything is written.

    Raises:
        ConfigError: see `find_pair`.
    """
    for each in written:
        find_pair(each)


def _plain(written: str) -> str:
    return written.lower().replace("cifar_", "").replace("_", "")


def make_sdd_cifar100(options: Options, root: str) -> Made:
    """The requested pairs, one after the other, in one table."""
    results: dict[str, ExperimentResult] = {}
    if options.quick and not options.pairs:
        document = shipped_document(options, root=root) | {"published": {}}
        results["resnet14 -> resnet8"] = _run(document, options, title="resnet14 -> resnet8")
    else:
        pairs = {pair.title: pair for pair in map(find_pair, options.pairs or USUAL)}
        for pair in pairs.values():
            document = pair_document(shipped_document(options, root=root), pair)
            results[pair.title] = _run(document, options, title=pair.title)
    first = next(iter(results.values()))
    tables = {title: _table(each, options) for title, each in results.items()}
    seconds = {
        f"{title}: {part}": spent
        for title, table in tables.items()
        for part, spent in table.seconds.items()
    }
    table = first.table(
        name=options.name,
        command=options.command,
        quick=options.quick,
        rows=tuple(row for table in tables.values() for row in table.rows),
        goals=tuple(goal for title, each in results.items() for goal in _goals(title, each)),
        notes=(*_notes(results.values()), *first.config.notes),
        settings=first.config.settings() | {"pairs": list(results)},
        seconds=seconds,
    )
    curves: dict[str, Curve] = {}
    for result in results.values():
        curves |= result.curves()
    return Made(table, curves)


def pair_document(document: Document, pair: Pair) -> Document:
    """The shipped experiment with the networks, scales and weights of another pair."""
    networks = {"teacher": pair.teacher, "student": pair.student}
    for kind, section in (
        ("teacher", document["teachers"]["teacher"]["student"]),
        ("student", document["students"]["student"]),
    ):
        section["model"] = networks[kind]
        section.pop("model_args", None)
    for name, method in document["methods"].items():
        if "scales" in method:
            method["scales"] = list(pair.nkd_scales if name == "sd-nkd" else pair.scales)
        if "beta" in method:
            method["beta"] = pair.beta
        if name == "sd-nkd":
            method["gamma"] = pair.beta
    cells = "-".join(map(str, pair.scales))
    shared = Path(document["out"])
    document["recordings"]["cells"] |= {
        "scales": list(pair.scales),
        "cache": str(shared / "recordings" / f"{pair.teacher}-{cells}" / "cache"),
    }
    teacher = document["teachers"]["teacher"]
    teacher["out"] = str(shared / "teachers" / pair.teacher)
    if pair.lr is not None:
        # The teacher keeps the learning rate of the file.
        teacher.setdefault("optimizer", dict(document["train"]["optimizer"]))
        document["train"]["optimizer"] = document["train"]["optimizer"] | {"lr": pair.lr}
    return document | {"out": str(shared / pair.folder), "published": pair.published}


def title_of(method: str) -> str:
    """The name of a method, as the paper writes it."""
    return "labels" if method == "ce" else method.upper()


def _run(document: Document, options: Options, *, title: str) -> ExperimentResult:
    titles = {method: f"{title}: student, {title_of(method)}" for method in METHODS}
    document |= {"titles": {"teacher": f"{title}: teacher", **titles}}
    config: ExperimentConfig = shipped_experiment(document, options)
    where = f"{options.name} {title}"
    return run_experiment(config, where=where, on_message=options.on_message)


def _table(result: ExperimentResult, options: Options) -> Table:
    return result.table(name=options.name, command=options.command, quick=options.quick)


def _goals(title: str, result: ExperimentResult) -> tuple[Goal, ...]:
    rows = {method: result.row(method) for method in METHODS}
    means = {method: row.mean for method, row in rows.items()}
    goals = [_above(title, means, "ce", METHODS[1:])]
    goals += [_above(title, means, base, [form]) for base, form in FORMS.items()]
    if result.config.published:
        goals.append(_near(title, rows))
    return tuple(goals)


def _above(title: str, means: Mapping[str, float | None], lower: str, upper: Sequence[str]) -> Goal:
    named = "every method" if len(upper) > 1 else title_of(upper[0])
    text = f"{title}: {named} above {title_of(lower)}"
    known = {name: mean for name in (lower, *upper) if (mean := means[name]) is not None}
    if len(known) <= len(upper):
        return Goal(text=text, measured="a run failed", met=None)
    least = min(upper, key=lambda name: known[name])
    measured = f"{title_of(least)} {known[least]:.2f}, {title_of(lower)} {known[lower]:.2f}"
    return Goal(text=text, measured=measured, met=known[least] > known[lower])


def _near(title: str, rows: Mapping[str, Row]) -> Goal:
    text = f"{title}: best epochs at most {WANTED_NEAR} below the published figures"
    short = []
    for method, row in rows.items():
        best = [run.best for run in row.runs if run.best is not None]
        if row.published is None:
            continue
        if not best or row.failures:
            return Goal(text=text, measured="a run failed", met=None)
        low = row.published[0] if isinstance(row.published, tuple) else row.published
        gap = low - sum(best) / len(best)
        if gap > WANTED_NEAR:
            short.append(f"{title_of(method)} by {gap:.2f}")
    return Goal(text=text, measured=f"below: {', '.join(short) or 'none'}", met=not short)


def _notes(results: Any) -> tuple[str, str]:
    sizes: set[int] = set()
    recorded: set[str] = set()
    for result in results:
        recorded.add(str(result.config.recordings["cells"]["seeds"]))
        history = result.teachers["teacher"].history
        if history is not None and history.last is not None:
            sizes.add(history.last.num_samples)
    known = [f"{50 / size**0.5:.1f} points with {size:,} test images" for size in sorted(sizes)]
    return (
        (
            "Published figures are of the best test epoch. Goals on the order of methods compare "
            "means of the last epoch. The test set is a sample too: near 50 % one figure has a "
            f"standard error of {' and '.join(known) or 'nothing measured'}."
        ),
        (
            "The teacher is this project's, trained on labels. All students of a pair learn on one "
            f"stream of recorded epochs (seeds {', '.join(sorted(recorded))}), so they see the "
            "same views in the same order; seeds are of their initial weights. The student on "
            "labels is among them."
        ),
    )
