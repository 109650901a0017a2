"""The build file and the train files of the demo, written so that a reader can run them again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from cache_service.config import dump_yaml
from cache_service.format.seeds import describe_seeds
from cache_service.storage.local import LocalStorage
from cli.experiments.demo.settings import WAYS, DemoSettings, Way
from distill.export import STUDENT_NAME

TEACHER, BUILD = "teacher", "build"
TRAIN_SPLIT = {"name": "digits"}
TEST_SPLIT = {"name": "digits", "split": "test"}

HALF = (0.5, 0.5, 0.5)
"""The teacher is trained on views from -1 to 1, as every student is that nobody told otherwise."""


def documents(settings: DemoSettings, out: str) -> dict[str, dict[str, Any]]:
    """Every file's content by its name without `.yaml`. Paths are as `out` is: they go with it."""
    return {
        TEACHER: _teacher(settings, out),
        BUILD: _build(settings, out),
        **{way.name: _way(settings, out, way) for way in WAYS},
    }


def write_files(settings: DemoSettings, out: str) -> dict[str, str]:
    """Write them into `out`. Returns the texts by file name."""
    storage, texts = LocalStorage(out), {}
    for name, document in documents(settings, out).items():
        path = f"{name}.yaml"
        body = dump_yaml(document)
        texts[path] = f"# {_how_to_run(name, out)}\n{body}"
        storage.put(path, texts[path].encode())
    storage.sweep()
    return texts


def _how_to_run(name: str, out: str) -> str:
    path = shlex.quote(str(Path(out) / f"{name}.yaml"))
    if name == BUILD:
        return f"kd-cache build {path}"
    if name == "live":
        return "kd-cache demo runs this one: the teacher of build.yaml answers beside the student."
    return f"kd-cache train {path}"


def _augment(settings: DemoSettings) -> dict[str, Any]:
    # No flip: a mirrored digit is no digit.
    crop = {"op": "pad_crop", "padding": settings.padding}
    return {"size": settings.view_size, "ops": [crop]}


def _teacher(settings: DemoSettings, out: str) -> dict[str, Any]:
    return {
        "dataset": TRAIN_SPLIT,
        "augment": _augment(settings),
        "student": {"model": settings.teacher_model},
        "method": {"name": "ce"},
        **_training(settings, lr=settings.teacher_lr, epochs=settings.teacher_epochs),
        "out": str(Path(out) / TEACHER),
    }


def _build(settings: DemoSettings, out: str) -> dict[str, Any]:
    return {
        "cache": str(Path(out) / "cache"),
        "dataset": TRAIN_SPLIT,
        "augment": _augment(settings),
        "seeds": _seeds(settings),
        "teacher": {
            "model": settings.teacher_model,
            "checkpoint": str(Path(out) / TEACHER / STUDENT_NAME),
            "mean": list(HALF),
            "std": list(HALF),
        },
        "scales": list(settings.scales),
        "codec": {"kind": "dense"},
        "device": settings.device,
        "threads": settings.threads,
    }


def _way(settings: DemoSettings, out: str, way: Way) -> dict[str, Any]:
    views: dict[str, Any] = {"caches": str(Path(out) / "cache")}
    if way.teacher != "cache":  # the same views, rendered from the same recipe and seeds
        views = {"augment": _augment(settings), "seeds": _seeds(settings)}
    return {
        "dataset": TRAIN_SPLIT,
        **views,
        "student": {"model": settings.student_model, "model_args": settings.student_args},
        "method": {"name": way.method},
        **_training(settings, lr=settings.lr, epochs=settings.epochs),
        "log_every": 1,  # every loss is compared, every step is timed
        "out": str(Path(out) / way.name),
    }


def _training(settings: DemoSettings, *, lr: float, epochs: int) -> dict[str, Any]:
    return {
        "optimizer": {
            "name": "sgd",
            "lr": lr,
            "nesterov": True,
            "weight_decay": settings.weight_decay,
        },
        "schedule": {"name": "cosine", "warmup_epochs": settings.warmup_epochs},
        "epochs": epochs,
        "batch_size": settings.batch_size,
        "channels_last": True,
        "workers": 0,  # a view takes 30 us: a process to render it would cost more than it saves
        "device": settings.device,
        "evaluate": {"dataset": TEST_SPLIT},
    }


def _seeds(settings: DemoSettings) -> str:
    return describe_seeds(tuple(range(settings.epochs)))
