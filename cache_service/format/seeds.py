"""Seeds as users write them: `0:30` is 0 to 29, `7` is one seed. No I/O."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator

MAX_SEED = 2**31 - 1
"""Seeds key a counter-based generator and index a Zarr axis; nobody records two billion epochs."""


def parse_seeds(value: Any) -> tuple[int, ...]:
    """Parse seeds; they come out ascending and without repeats.

    Args:
        value: `"0:30"`, `"7"`, `7`, or a list of those.

    Raises:
        ValueError: anything else, an empty range, or a seed below 0.
    """
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("seeds is an empty list; write 0:30 for seeds 0 to 29")
        return tuple(sorted({seed for part in value for seed in parse_seeds(part)}))
    first, colon, last = str(value).partition(":")
    if not _is_number(first) or (colon and not _is_number(last)):
        raise ValueError(f"seeds {value!r} is not of the form 0:30 (which is 0 to 29) or 7")
    start = int(first)
    stop = int(last) if colon else start + 1
    if not start < stop <= MAX_SEED:
        raise ValueError(f"seeds {value!r} names no seed: the second number is one past the last")
    return tuple(range(start, stop))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


Seeds = Annotated[tuple[int, ...], BeforeValidator(parse_seeds)]
"""A pydantic field of seeds in the form that `parse_seeds` takes."""


def describe_seeds(seeds: list[int] | tuple[int, ...]) -> str:
    """Ascending seeds as users write them: `0:8, 12:13`, or `none`."""
    runs: list[list[int]] = []
    for seed in seeds:
        if runs and runs[-1][1] == seed:
            runs[-1][1] = seed + 1
        else:
            runs.append([seed, seed + 1])
    return ", ".join(f"{first}:{last}" for first, last in runs) or "none"
