"""Published tables that can be made again, by name. A new one is an experiment file in `shipped/`
and a line here; what it needs beyond the runner stands in a module of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cache_service.errors import ConfigError
from cli.experiments.reproduce.cifar100 import decode
from cli.experiments.reproduce.deit_cifar100 import make_deit_cifar100
from cli.experiments.reproduce.hinton import make_hinton_mnist, make_omitted_three
from cli.experiments.reproduce.sdd_cifar100 import make_sdd_cifar100, refuse_unknown_pairs
from cli.experiments.reproduce.shipped import Made, Options, shipped_document, shipped_experiment
from cli.experiments.runner import run_experiment
from distill.students import choose_device


class Reproduction(NamedTuple):
    """A published table that can be made again.

    Attributes:
        data: where its dataset is looked for by default.
        make: trains what is not trained yet, and measures.
        options: of `pair` and `device`, those that it takes.
    """

    data: str
    make: Callable[[Options], Made]
    options: frozenset[str] = frozenset()


RUNS = 3
"""Runs per figure by default; the short form has one."""


def make_on_cifar100(make: Callable[[Options, str], Made]) -> Callable[[Options], Made]:
    """Decode CIFAR-100, once for all tables in the same folder, before a table is made."""

    def decode_and_make(options: Options) -> Made:
        refuse_unknown_pairs(options.pairs)
        root = str(Path(options.out, "cifar100"))
        decode(options.data, root)
        return make(options, root)

    return decode_and_make


def make_as_shipped(options: Options, root: str) -> Made:
    """A table that needs nothing beyond its experiment file."""
    config = shipped_experiment(shipped_document(options, root=root), options)
    result = run_experiment(config, where=options.name, on_message=options.on_message)
    table = result.table(name=options.name, command=options.command, quick=options.quick)
    return Made(table, result.curves())


REPRODUCTIONS = {
    "hinton-mnist": Reproduction("data/mnist", make_hinton_mnist),
    "omitted-three": Reproduction("data/mnist", make_omitted_three),
    "sdd-cifar100": Reproduction(
        "data/cifar100", make_on_cifar100(make_sdd_cifar100), frozenset({"pair", "device"})
    ),
    "deit-cifar100": Reproduction(
        "data/cifar100", make_on_cifar100(make_deit_cifar100), frozenset({"device"})
    ),
    "ddgsd-cifar100": Reproduction(
        "data/cifar100", make_on_cifar100(make_as_shipped), frozenset({"device"})
    ),
    "seeds-cifar100": Reproduction(
        "data/cifar100", make_on_cifar100(make_as_shipped), frozenset({"device"})
    ),
}


def find_reproduction(name: str) -> Reproduction:
    """The reproduction of a name.

    Raises:
        ConfigError: there is none; lists those there are.
    """
    if name not in REPRODUCTIONS:
        raise ConfigError(
            f"there is no reproduction {name!r}.", hint=f"There are {', '.join(REPRODUCTIONS)}."
        )
    return REPRODUCTIONS[name]


def refuse_options(name: str, *, pair: list[str] | None, device: str | None) -> None:
    """Refuse options that a reproduction does not take, and a device that is not here.

    Raises:
        ConfigError: names the first of them.
    """
    for option, value in (("pair", pair), ("device", device)):
        if value is not None and option not in find_reproduction(name).options:
            raise ConfigError(f"{name} takes no --{option}.", hint="Leave it out.")
    if device is not None:
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
            raise ConfigError(
                f"--device {device!r} is no device.",
                hint="Use auto, cpu, cuda or one such as cuda:1.",
            )
        choose_device(device)
