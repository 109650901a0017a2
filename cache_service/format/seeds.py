"""Seeds as people write them: `0:30` is 0 to 29, `7` is one seed. Pure."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

MAX_SEED = 2**31 - 1
"""Seeds key a counter-based generator and index a Zarr axis; nobody records two billion epochs."""


def parse_seeds(written: Any) -> tuple[int, ...]:
    """The seeds meant, ascending.

    Args:
        written: `"0:30"`, `"7"`, `7`, or a list of those.

    Raises:
        ValueError: anything else, an empty range, or a seed below 0.
    """
    if isinstance(written, list | tuple):
        if not written:
            raise ValueError("seeds is an empty list; write 0:30 for seeds 0 to 29")
        return tuple(sorted({seed for part in written for seed in parse_seeds(part)}))
    first, colon, last = str(written).partition(":")
    if not _is_number(first) or (colon and not _is_number(last)):
        raise ValueError(f"seeds {written!r} is not of the form 0:30 (which is 0 to 29) or 7")
    start = int(first)
    stop = int(last) if colon else start + 1
    if not start < stop <= MAX_SEED:
        raise ValueError(f"seeds {written!r} names no seed: the second number is one past the last")
    return tuple(range(start, stop))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


Seeds = Annotated[tuple[int, ...], BeforeValidator(parse_seeds)]
"""A pydantic field of seeds, written as `parse_seeds` reads them."""


def describe_seeds(seeds: list[int] | tuple[int, ...]) -> str:
    """Ascending seeds as people write them: `0:8, 12:13`, or `none`."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and runs[-1][1] == seed:
            runs[-1][1] = seed + 1
        else:
            runs.append([seed, seed + 1])
    return ", ".join(f"{first}:{last}" for first, last in runs) or "none"
