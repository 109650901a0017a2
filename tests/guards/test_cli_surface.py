"""The commands and options that scripts rely on. Adding one means adding it here, and a line to the
changelog; taking one away breaks somebody's script."""

from __future__ import annotations

import pytest
from support.program import program

FROZEN = {
    "demo": {"--out", "--json"},
    "plan": {"FILE", "--set", "--json"},
    "build": {"FILE", "--seeds", "--engine", "--address", "--shard", "--set", "--json"},
    "info": {"CACHE", "--json"},
    "verify": {
        *("CACHE", "--recompute", "--shard", "--sample", "--processes"),
        *("--repair", "--no-repair", "--set", "--json"),
    },
    "serve": {"ROOT", "--host", "--port", "--prefix", "--config", "--set", "--json"},
    "token": {"--name", "--scope", "--add", "--json"},
    "train": {"FILE", "--set", "--json"},
    "cycle": {"FILE", "--set", "--json"},
    "experiment": {"FILE", "--out", "--quick", "--set", "--json"},
    "reproduce": {
        "NAME",
        "--quick",
        "--out",
        "--data",
        "--seeds",
        "--pair",
        "--device",
        "--json",
    },
    "bench": {
        "NAME",
        "--pair",
        "--device",
        "--images",
        "--s3",
        "--cache",
        "--quick",
        "--out",
        "--json",
    },
    "distill": {
        "DIR",
        "--teacher",
        "--student",
        "--teacher-checkpoint",
        "--train-teacher",
        "--method",
        "--epochs",
        "--seeds",
        "--runs",
        "--size",
        "--hold-out",
        "--name",
        "--out",
        "--device",
        "--baseline",
        "--no-baseline",
        "--dry-run",
        "--set",
        "--json",
    },
    "evaluate": {"CHECKPOINT", "--cache", "--dataset", "--device", "--json"},
}


def surface(command):
    names = set()
    for each in command.params:
        is_argument = each.param_type_name == "argument"
        names |= {each.metavar} if is_argument else {*each.opts, *each.secondary_opts}
    return names - {"--help"}


def test_the_commands_are_these():
    assert set(program().commands) == set(FROZEN)


@pytest.mark.parametrize("name", FROZEN)
def test_the_options_of_a_command_are_these(name):
    assert surface(program().commands[name]) == FROZEN[name]


def test_every_command_and_option_is_explained():
    for name, command in program().commands.items():
        assert command.help, name
        for each in command.params:
            assert each.help, f"{name} {each.name}"


def test_every_command_that_reports_has_json():
    assert {name for name, options in FROZEN.items() if "--json" not in options} == set()
