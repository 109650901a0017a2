"""Keeps the reference parts of these pages equal to the code that they describe.

    python docs/generate.py           writes them anew
    python docs/generate.py --check   lists the pages that are stale, and exits with 1

A generated part lies between `<!-- generated: NAME -->` and `<!-- end -->`, and NAME is one of
`PARTS` below. Everything around it is written by hand. A test holds the pages to this.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, only this folder is
    sys.path.insert(0, str(ROOT))

from docs import (  # noqa: E402  found through the line above
    codebase,
    commands,
    figures,
    scale,
    service,
    settings,
)

PAGES = ("README.md", "docs/*.md", "examples/*.md")

PARTS: dict[str, Callable[[], str]] = {
    "build file": settings.build_file,
    "train file": settings.train_file,
    "free keys": settings.free_keys,
    "own keys": settings.own_keys,
    "ops": settings.ops,
    "presets": settings.presets,
    "methods": settings.methods,
    "method list": settings.method_list,
    "commands": commands.reference,
    "command list": commands.overview,
    "serve file": settings.serve_file,
    "cycle file": settings.cycle_file,
    "experiment file": settings.experiment_file,
    "routes": service.routes,
    "service codes": service.codes,
    "errors": codebase.errors,
    "scale storage": scale.storage,
    "scale computing": scale.computing,
    "scale reading": scale.reading,
    "tree": codebase.tree,
    "goals of benchmarks": figures.goals,
    "costs": figures.costs,
}

_PART = re.compile(r"(<!-- generated: (?P<name>[^>]+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> Iterator[Path]:
    """Every page that may have generated parts."""
    for pattern in PAGES:
        yield from sorted(ROOT.glob(pattern))


def current(text: str) -> str:
    """A page with its generated parts as they should be.

    Raises:
        KeyError: a part that nothing here generates.
    """

    def part(found: re.Match[str]) -> str:
        return f"{found[1]}\n{PARTS[found['name']]().strip()}\n\n{found[3]}"

    return _PART.sub(part, text)


def stale_pages() -> list[Path]:
    """Pages whose generated parts are not what they should be."""
    return [page for page in pages() if current(page.read_text()) != page.read_text()]


def main(arguments: list[str]) -> int:
    """Write, or with `--check` only look."""
    stale = stale_pages()
    for page in stale:
        if "--check" not in arguments:
            page.write_text(current(page.read_text()))
        sys.stdout.write(f"{page.relative_to(ROOT)}\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
