"""Reproductions by name. A new one is a file with a `REPRODUCTION`, and a line here."""

from __future__ import annotations

from cache_service.errors import ConfigError
from cli.reproduce import hinton_mnist, omitted_three
from cli.reproduce.order import Reproduction

_ALL = (
    hinton_mnist.REPRODUCTION,
    omitted_three.REPRODUCTION,
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
