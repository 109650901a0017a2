"""Figures, times and messages as the text and HTML of the pages."""

from __future__ import annotations

import re
import time
from html import escape

from markupsafe import Markup

_WORD = re.compile(r"[a-z]+[ ,']")
"""An ordinary word, and no path, setting or name, at the beginning of a message."""

UNKNOWN = "\N{EN DASH}"
"""Shown in place of a figure that is not known."""


def count(number: float) -> str:
    """`1234567` -> `1,234,567`."""
    return f"{number:,.0f}"


def latency(seconds: float | None) -> str:
    """Milliseconds up to a second."""
    if seconds is None:
        return UNKNOWN
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def percent(fraction: float) -> str:
    """Whole percent, but neither 0 nor 100 % for a fraction that is only close to them."""
    number = 100 * fraction
    if 0 < number < 1:
        return "<1%"
    if 99 < number < 100:
        return ">99%"
    return f"{number:.0f}%"


def fine_percent(fraction: float) -> str:
    """Two digits of a percentage, also of a small one: `0.0123%`, `3.2e-06%`."""
    number = 100 * fraction
    if number >= 10 or number == 0:
        return percent(fraction)
    return f"{number:.2g}%"


def moment(unix_s: float | None, *, now_s: float | None = None) -> Markup:
    """A Unix time as a `time` element: in UTC here, and by the script in the visitor's own zone.

    Args:
        unix_s: the time; None for one that is not known.
        now_s: the present, which decides whether the year is named.
    """
    if unix_s is None:
        return safe(UNKNOWN)
    at, now = time.gmtime(unix_s), time.gmtime(now_s)
    year = "" if at.tm_year == now.tm_year else f" {at.tm_year}"
    shown = f"{at.tm_mday} {time.strftime('%b', at)}{year} {time.strftime('%H:%M', at)} UTC"
    return safe(f'<time datetime="{time.strftime("%Y-%m-%dT%H:%M:%SZ", at)}">{shown}</time>')


def prose(text: str) -> Markup:
    """A message as sentences: with a capital letter, and the parts in backticks set as code."""
    if _WORD.match(text):
        text = text[0].upper() + text[1:]
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:  # a single backtick is an ordinary character
        return safe("`".join(parts))
    return safe(
        "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))
    )


def safe(html: str) -> Markup:
    """HTML in which every name is escaped already."""
    return Markup(html)  # noqa: S704  callers have escaped every name
