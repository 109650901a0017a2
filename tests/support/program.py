"""The real command line, asked whether it would take some words, without running them."""

from __future__ import annotations

import re
import shlex
from typing import Any

import typer

from cache_service.config import load_yaml_config
from cache_service.recording.build_config import BuildConfig
from cli.experiments.cycle import CycleConfig
from cli.experiments.experiment_file import ExperimentConfig
from cli.main import app
from distill.config import TrainConfig, load_config
from support.pages import ROOT

FILES = {
    "plan": "cifar100.build",
    "build": "cifar100.build",
    "train": "cifar100.train",
    "cycle": "digits.cycle",
    "experiment": "digits.experiment",
}
"""What FILE stands for, by command."""

MODELS = {
    "plan": BuildConfig,
    "build": BuildConfig,
    "train": TrainConfig,
    "cycle": CycleConfig,
    "experiment": ExperimentConfig,
}


def program() -> Any:
    return typer.main.get_command(app)


def commands_in(script: str) -> list[list[str]]:
    """The words of each kd-cache command of a shell script."""
    found = []
    for line in re.sub(r"\\\n", " ", script).splitlines():
        for part in re.split(r"&&|;|\|", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(part)
            if "kd-cache" in words and words[0] not in ("git", "cd"):  # the name of a folder
                found.append(words[words.index("kd-cache") + 1 :])
    return found


def refuse_unparsed(words: list[str], *, with_settings: bool = True) -> None:
    """Raise what the program would raise; check `--set` against the file that is named."""
    name, *rest = words
    if name.startswith("--"):
        own = {option for each in program().params for option in each.opts}
        assert name in own | {"--help"}, name
        return
    assert name in program().commands, f"there is no command {name}"
    if not rest:
        return  # a mention of the command
    context = program().commands[name].make_context(name, list(rest))
    if name in MODELS and with_settings:
        written = context.params["file"]
        file = ROOT / written
        if not file.is_file():
            assert written == "FILE", f"no file {written}"
            file = ROOT / "examples" / f"{FILES[name]}.yaml"
        settings = context.params["settings"] or []
        if MODELS[name] is TrainConfig:
            load_config(file, settings)
        else:
            load_yaml_config(MODELS[name], file, settings)
