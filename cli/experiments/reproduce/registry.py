"""Reproductions by name. A new one is a file with a `REPRODUCTION`, and a line here."""

from __future__ import annotations

import re

from cache_service.errors import ConfigError
from cli.experiments.reproduce import (
    ddgsd_cifar100,
    deit_cifar100,
    hinton_mnist,
    omitted_three,
    sdd_cifar100,
)
from cli.experiments.reproduce.order import Reproduction
from distill.students import choose_device

_ALL = (
    hinton_mnist.REPRODUCTION,
    omitted_three.REPRODUCTION,
    sdd_cifar100.REPRODUCTION,
    deit_cifar100.REPRODUCTION,
    ddgsd_cifar100.REPRODUCTION,
)

REPRODUCTIONS = {reproduction.name: reproduction for reproduction in _ALL}


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


def refuse_options(reproduction: Reproduction, **given: object) -> None:
    """Refuse options that mean nothing to a reproduction.

    Raises:
        ConfigError: names the first of them.
    """
    for option, value in given.items():
        if value is not None and option not in reproduction.options:
            raise ConfigError(f"{reproduction.name} takes no --{option}.", hint="Leave it out.")


def refuse_device(device: str) -> None:
    """Refuse a device that is none, or that this machine has not, before data are looked for.

    Raises:
        ConfigError: in one line.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError(
            f"--device {device!r} is no device.", hint="Use auto, cpu, cuda or one such as cuda:1."
        )
    choose_device(device)
