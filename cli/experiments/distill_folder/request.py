"""What `kd-cache distill` was asked for, checked, and as an experiment.

Everything that can be wrong with a name, a folder or a number is refused here, before weights are
fetched or anything is written.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm

from cache_service.config import Frozen, override_document, suggest, validate_config
from cache_service.datasets import DatasetConfig, ImageDataset, open_dataset
from cache_service.datasets.folder import SPLIT_SYNONYMS
from cache_service.errors import ConfigError, DatasetError
from cache_service.format.seeds import describe_seeds, parse_seeds
from cache_service.human_format import describe_error
from cache_service.models.create import TIMM_SOURCES, TORCHVISION, refuse_unknown_model
from cache_service.recording.build_config import BuildConfig
from cli.experiments.experiment_file import Document, ExperimentConfig, merge_documents
from distill.config import EvaluateConfig, TrainConfig
from distill.export import STUDENT_NAME

WHERE = "kd-cache distill"

BASELINE = "labels"
"""Name of the student that learns from labels alone."""

DEFAULT_RECORDED = 10
"""Recorded epochs if neither --seeds nor a smaller --epochs says otherwise."""

DEFAULT_SHARE = 0.2
"""Share of each class that is held out where the folder has no split for evaluation."""

DEFAULT_SIZE = 224
"""Side of the views, px, for teachers that are not described."""

MAX_PROBES = 16
"""Images whose sizes decide between random crops of padded and of resized images."""

CELL_SCALES = (1, 2, 4)
"""Grids that are recorded for methods on cells."""

METHODS = (
    *("kd", "logits", "dist", "dkd", "nkd", "sd-kd", "sd-dkd", "sd-nkd", "soft", "hard"),
    "ensemble",
)
"""Methods that learn from one teacher and need no setting."""

NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}"
"""What an experiment takes as the name of a folder."""

SECTIONS = {
    "teacher": "`teacher` of a build file",
    "student": "`student` of a train file",
    "dataset": "`dataset` of both files and of `evaluate`",
    "evaluate": "`evaluate` of a train file",
    "augment": "`augment` of a build file",
    "method": "`method` of a train file",
    "codec": "`codec` of a build file",
    "build": "the other keys of a build file",
    "train": "the other keys of a train file",
}
"""First parts of the keys of --set."""

FILES: dict[str, type[Frozen]] = {"train": TrainConfig, "build": BuildConfig}
"""Files whose other keys have a section of --set."""

OPTIONS = {
    "teacher.model": "--teacher",
    "student.model": "--student",
    "dataset.name": "DIR",
    "dataset.root": "DIR",
    "method.name": "--method",
    "build.seeds": "--seeds",
    "build.cache": "--out",
    "train.epochs": "--epochs",
    "train.out": "--out",
}
"""Keys that have an argument of their own."""

NETWORK_KEYS = ("pretrained", "checkpoint", "checkpoint_weights", "model_args", "mean", "std")
"""Keys of `teacher` that also say which network --train-teacher starts from."""

PATH_KEYS = ("checkpoint", "classes")
"""Keys of `teacher` and `student` that may name a file."""


class Request(NamedTuple):
    """The arguments of the command; see its help."""

    folder: str
    teacher: str
    student: str
    teacher_checkpoint: str | None = None
    train_teacher: int | None = None
    method: str = "kd"
    epochs: int = 30
    seeds: str | None = None
    runs: int = 1
    size: int | None = None
    hold_out: float | None = None
    name: str | None = None
    out: str | None = None
    device: str = "auto"
    baseline: bool = True
    settings: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """What makes the same table again."""
        words = ["kd-cache", "distill", self.folder]
        for name, value in self._asdict().items():
            if name in ("folder", "settings") or value == self._field_defaults.get(name):
                continue
            option = "--" + name.replace("_", "-")
            words += ["--no-baseline"] if name == "baseline" else [option, str(value)]
        words += [word for setting in self.settings for word in ("--set", setting)]
        return shlex.join(words)


class Planned(NamedTuple):
    """A request as an experiment.

    Attributes:
        config: the experiment.
        teacher, student: its names of the two, which are also names of files and folders.
        images, held_out: those to learn from, and those for evaluation.
        division: how they were told apart, for people.
    """

    config: ExperimentConfig
    teacher: str
    student: str
    images: ImageDataset
    held_out: ImageDataset
    division: str


def plan_request(request: Request) -> Planned:
    """Check a request as far as that is possible without its networks.

    Raises:
        ConfigError, DatasetError: one line.
    """
    root = _find_folder(request.folder)
    _refuse_out_among_images(root, request)
    for option, name in (("--teacher", request.teacher), ("--student", request.student)):
        _check_model(option, name)
    _check_numbers(request)
    given = _read_settings(request.settings)
    _check_weights(request, given["teacher"])
    dataset, evaluate, division = _divide(root, request, given)
    images = open_dataset(validate_config(DatasetConfig, dataset, where=f"{WHERE}: dataset"))
    held_out = _open_held_out(evaluate, images)
    _check_size(request, given)
    size = given["augment"].get("size") or request.size or default_size(request.teacher)
    document = _assemble(request, given, dataset=dataset, evaluate=evaluate)
    document["augment"] = _augment(images, size, given["augment"])
    config = validate_config(ExperimentConfig, document, where=WHERE)
    teacher, student = folder_name(request.teacher), student_name(request)
    return Planned(config, teacher, student, images, held_out, division)


def default_size(teacher: str) -> int:
    """Side of the images that a network of timm was trained on, px."""
    if ":" in teacher or "/" in teacher:
        return DEFAULT_SIZE
    described = timm.get_pretrained_cfg(teacher, allow_unregistered=True)
    if described is None or described.input_size is None:
        return DEFAULT_SIZE
    return int(max(described.input_size[1:]))


def folder_name(model: str) -> str:
    """The name of a network as one of a folder: `hf-hub:timm/resnet18` becomes hf-hub-timm-..."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", model).strip("-._+")[:64] or "network"


def student_name(request: Request) -> str:
    """The name of the student in files and folders."""
    return request.name or folder_name(request.student)


def _out(request: Request) -> Path:
    out = Path(request.out or Path("distill-out", Path(request.folder).absolute().name))
    return out.expanduser().absolute()


def _refuse_out_among_images(root: Path, request: Request) -> None:
    if _out(request).resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"the output folder {_out(request)} lies among the images in {root}, where it would "
            "become one of their folders.",
            hint="Choose another one with --out.",
        )


def _find_folder(folder: str) -> Path:
    try:
        root = Path(folder).expanduser().absolute()
        if root.is_dir():
            return root
        is_file = root.exists()
        beside = [each.name for each in root.parent.iterdir()] if root.parent.is_dir() else []
    except (OSError, RuntimeError) as error:  # RuntimeError: ~NAME of a user that is not known
        raise ConfigError(f"cannot read {folder}: {describe_error(error)}.") from error
    if is_file:
        raise ConfigError(
            f"{folder} is a file.", hint="Name a folder with one subfolder for each class."
        )
    close = difflib.get_close_matches(root.name, beside, n=3)
    raise ConfigError(
        f"there is no folder {folder}.",
        hint=f"Close to it: {', '.join(close)}."
        if close
        else "Name a folder with one subfolder for each class, or with train and val in it.",
    )


def _check_model(option: str, name: str) -> None:
    if Path(name).exists() and not name.endswith(".py"):
        raise ConfigError(
            f"{option} {name} is a file or folder, not the name of a network.",
            hint="Name the network, and its weights with --teacher-checkpoint FILE."
            if option == "--teacher"
            else "Name the network, and its weights with --set student.checkpoint=FILE.",
        )
    try:
        refuse_unknown_model(name)
    except ConfigError as error:
        raise ConfigError(f"{option} {name}: {error.message}", hint=error.hint) from error


def _check_numbers(request: Request) -> None:
    if request.method not in METHODS:
        raise ConfigError(
            f"--method {request.method} is not one that learns from one teacher without further "
            "settings.",
            hint=f"There are {', '.join(METHODS)}.",
        )
    bounds: tuple[tuple[str, float | None, float, float], ...] = (
        ("--epochs", request.epochs, 1, 100_000),
        ("--runs", request.runs, 1, 100),
        ("--size", request.size, 8, 4096),
        ("--train-teacher", request.train_teacher, 1, 100_000),
    )
    for option, value, low, high in bounds:
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{option} {value} is not between {low:g} and {high:g}.")
    if request.name is not None and not re.fullmatch(NAME, request.name):
        raise ConfigError(
            f"--name {request.name} is not a name of a folder.",
            hint="Use up to 64 letters, digits, dots, hyphens, plus signs and underscores.",
        )
    if request.hold_out is not None and not 0 < request.hold_out < 1:
        raise ConfigError(
            f"--hold-out {request.hold_out:g} is not a share between 0 and 1.",
            hint=f"For a fifth of each class, type --hold-out {DEFAULT_SHARE}.",
        )
    recorded_seeds(request)


def recorded_seeds(request: Request) -> tuple[int, ...]:
    """The seeds to record: `--seeds 10` is 0 to 9, and `--seeds 5:8` as in a build file.

    Raises:
        ConfigError: another form.
    """
    if request.seeds is None:
        return tuple(range(min(request.epochs, DEFAULT_RECORDED)))
    text = f"0:{request.seeds}" if request.seeds.isdecimal() else request.seeds
    try:
        return parse_seeds(text)
    except ValueError as problem:
        raise ConfigError(
            f"--seeds {request.seeds} is not a number of epochs to record.",
            hint="Type --seeds 10 for ten, or seeds as in a build file, such as 0:10.",
        ) from problem


def _read_settings(settings: tuple[str, ...]) -> dict[str, Document]:
    """The values of --set by section; a section that is not set is empty."""
    for setting in settings:
        key = setting.partition("=")[0].strip()
        section, dot, _ = key.partition(".")
        if section not in SECTIONS:
            near = [name for name, model in FILES.items() if section in model.model_fields]
            raise ConfigError(
                f"--set {setting}: keys begin with one of {', '.join(SECTIONS)}; "
                + (f"did you mean {near[0]}.{key}?" if near else suggest(section, [*SECTIONS]))
            )
        if not dot:
            raise ConfigError(
                f"--set {setting}: {section} is a section.",
                hint=f"Name a key of it, which is {SECTIONS[section]}.",
            )
        if key in OPTIONS:
            raise ConfigError(f"--set {setting}: type this as {OPTIONS[key]}.")
    given = override_document({}, settings)
    return {section: given.get(section) or {} for section in SECTIONS}


def _check_weights(request: Request, teacher: Document) -> None:
    """Refuse a teacher without weights, and weights that are named twice."""
    if request.teacher_checkpoint is not None:
        if "checkpoint" in teacher:
            raise ConfigError("--teacher-checkpoint and --set teacher.checkpoint: give one.")
        if not Path(request.teacher_checkpoint).expanduser().is_file():
            raise ConfigError(
                f"there is no file --teacher-checkpoint {request.teacher_checkpoint}.",
                hint="Name a .safetensors, .pt or .pth file of weights.",
            )
    named = request.teacher_checkpoint or {"checkpoint", "pretrained"} & teacher.keys()
    name = request.teacher
    is_timm = not (":" in name or "/" in name)
    if not named and request.train_teacher is None and is_timm:
        if timm.is_model_pretrained(name):
            return
        architecture, _, tag = name.partition(".")
        tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{architecture}.*")]
        raise ConfigError(
            f"--teacher {name}: timm has no pretrained weights {tag} for {architecture}."
            if tags and tag
            else f"--teacher {name} has no published weights.",
            hint=f"It has {', '.join(tags)}."
            if tags
            else "Give --teacher-checkpoint FILE, or --train-teacher EPOCHS to train it on DIR.",
        )


def _divide(
    root: Path, request: Request, given: dict[str, Document]
) -> tuple[Document, Document, str]:
    """`dataset`, `evaluate`, and in words which images are for evaluation."""
    dataset: Document = {"name": "folder", "root": str(root), "split": "train"}
    own = {key: value for key, value in given["dataset"].items() if key != "split"}
    found = next(_evaluation_splits(root), None)
    share = given["dataset"].get("hold_out", request.hold_out)
    split = "val"
    if share is None and found is not None:
        split, division = found
    else:
        share = DEFAULT_SHARE if share is None else share
        own["hold_out"] = share
        why = "" if found is not None else f" ({request.folder} has no folder val or test)"
        division = f"{100 * share:.3g} % of each class, chosen by the names of the files{why}"
    evaluate: Document = {
        "dataset": {**dataset, **own, "split": split},
        "every": max(1, request.epochs // 10),
    }
    return (
        {**dataset, **given["dataset"], **own},
        merge_documents(evaluate, given["evaluate"]),
        division,
    )


def _evaluation_splits(root: Path) -> Iterator[tuple[str, str]]:
    """Splits for evaluation, and their folders, for people.

    Beside a split for training, one without class folders counts too: it needs a file of labels.
    """
    training, *others = SPLIT_SYNONYMS
    has_training = any(_has_folders(root / name) for name in training)
    for split, *synonyms in others:
        for name in (split, *synonyms):
            folder = root / name
            if _has_folders(folder) or (has_training and folder.is_dir()):
                yield split, str(folder)


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and any(
        each.is_dir() and not each.name.startswith(".") for each in folder.iterdir()
    )


def _open_held_out(evaluate: Document, images: ImageDataset) -> ImageDataset:
    """The images for evaluation, which must have the classes of training."""
    config = validate_config(EvaluateConfig, evaluate, where=f"{WHERE}: evaluate")
    try:
        held_out = open_dataset(config.dataset, class_names=images.classes)
    except (ConfigError, DatasetError) as error:
        hint = f"{error.hint} Keys of it are --set evaluate.dataset.KEY=VALUE."
        raise type(error)(f"evaluation images: {error.message}", hint=hint.strip()) from error
    if held_out.id.num_classes != images.id.num_classes:
        raise ConfigError(
            f"the images for evaluation have {held_out.id.num_classes} classes, and those to learn "
            f"from {images.id.num_classes}.",
            hint="Hold out a share of the latter by --hold-out 0.2.",
        )
    return held_out


def _check_size(request: Request, given: dict[str, Document]) -> None:
    if request.size is not None and "size" in given["augment"]:
        raise ConfigError("--size and --set augment.size: give one.")


def _augment(images: ImageDataset, size: int, given: Document) -> Document:
    """Random crops and flips: of the padded image where it has the view's size, else resized."""
    augment: Document = {"size": size, **given}
    if {"preset", "ops", "callable"} & given.keys():
        return augment
    step = max(1, len(images) // MAX_PROBES)
    sizes = {images.image(index).size for index in range(0, len(images), step)}
    if sizes == {(size, size)}:
        crop = {"op": "pad_crop", "padding": max(1, size // 8)}
        return augment | {"ops": [crop, {"op": "horizontal_flip"}]}
    return augment | {"preset": "imagenet"}


def _assemble(
    request: Request, given: dict[str, Document], *, dataset: Document, evaluate: Document
) -> Document:
    """The experiment file, but for its augmentation."""
    teacher, student, out = folder_name(request.teacher), student_name(request), _out(request)
    shown = request.name or request.student
    method = {"name": request.method, **given["method"]}
    recording: Document = {
        "teacher": _teacher(request, given["teacher"], out),
        "seeds": describe_seeds(recorded_seeds(request)).split(", "),
        "codec": {"kind": "dense"},
        "batch_size": 64,
        "device": request.device,
    }
    if request.method.startswith("sd-"):
        recording["scales"] = list(CELL_SCALES)
    has_weights = given["student"].get("pretrained") or given["student"].get("checkpoint")
    training = _training(request.epochs, has_weights=bool(has_weights), request=request)
    build = given["build"] | ({"codec": given["codec"]} if given["codec"] else {})
    document: Document = {
        "title": f"{shown} from {request.teacher} on {Path(request.folder).absolute().name}",
        "out": str(out),
        "runs": request.runs,
        "dataset": dataset,
        "evaluate": evaluate,
        "train": merge_documents(training, given["train"]),
        "recordings": {teacher: merge_documents(recording, build)},
        "students": {student: {"model": _portable(request.student), **_paths(given["student"])}},
        "methods": {request.method: {"method": method}},
        "titles": {request.method: f"{shown}, {request.method}"},
    }
    if request.baseline:
        document["methods"][BASELINE] = {"method": {"name": "ce"}}
        document["titles"][BASELINE] = f"{shown}, labels alone"
    if request.train_teacher is not None:
        document["teachers"] = {teacher: _training_of_teacher(request, given)}
        document["titles"][teacher] = f"teacher {request.teacher}"
    return document


def _training(epochs: int, *, has_weights: bool, request: Request) -> Document:
    """AdamW, because it needs no tuning to start with; at a lower rate from trained weights."""
    return {
        "optimizer": {
            "name": "adamw",
            "lr": 2e-4 if has_weights else 1e-3,
            "weight_decay": 0.05,
            "no_decay_bias": True,
        },
        "schedule": {"name": "cosine", "warmup_epochs": round(min(5.0, epochs / 10), 2)},
        "epochs": epochs,
        "batch_size": 64,
        "device": request.device,
    }


def _training_of_teacher(request: Request, given: dict[str, Document]) -> Document:
    """Keys of its train file that are not the students'."""
    assert request.train_teacher is not None
    own = {key: given["teacher"][key] for key in NETWORK_KEYS if key in given["teacher"]}
    network = {"model": _portable(request.teacher), **_paths(own)}
    if request.teacher_checkpoint is not None:
        network["checkpoint"] = str(Path(request.teacher_checkpoint).expanduser().absolute())
    elif not own.keys() & {"pretrained", "checkpoint"} and _is_published(request.teacher):
        network["pretrained"] = True
    has_weights = network.get("pretrained") or network.get("checkpoint")
    training = _training(request.train_teacher, has_weights=bool(has_weights), request=request)
    return merge_documents(training, given["train"]) | {"student": network}


def _is_published(name: str) -> bool:
    if name.startswith((TORCHVISION, *TIMM_SOURCES)):
        return True
    return ":" not in name and timm.is_model_pretrained(name)


def _teacher(request: Request, given: Document, out: Path) -> Document:
    """`teacher:` of the build file."""
    teacher: Document = {"model": _portable(request.teacher), **_paths(given)}
    if request.train_teacher is not None:
        for key in ("pretrained", "checkpoint_weights", "mean", "std"):
            teacher.pop(key, None)  # of the weights that training starts from
        trained = out / "teachers" / folder_name(request.teacher) / STUDENT_NAME
        return teacher | {"checkpoint": str(trained)}
    if request.teacher_checkpoint is not None:
        checkpoint = str(Path(request.teacher_checkpoint).expanduser().absolute())
        return teacher | {"checkpoint": checkpoint}
    if not given.keys() & {"pretrained", "checkpoint"} and _is_published(request.teacher):
        teacher["pretrained"] = True
    return teacher


def _portable(model: str) -> str:
    """A network's name that means the same in every folder."""
    file, colon, factory = model.rpartition(":")
    if colon and file.endswith(".py"):
        return f"{Path(file).expanduser().absolute()}:{factory}"
    return model


def _paths(given: Document) -> Document:
    """The keys of a network, with files of this folder named in full."""
    full: dict[str, Any] = dict(given)
    for key in PATH_KEYS:
        if isinstance(full.get(key), str) and Path(full[key]).is_file():
            full[key] = str(Path(full[key]).absolute())
    return full
