"""Run a reproduction and write its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from cache_service.storage.local import LocalStorage
from cli.experiments.reproduce.markdown import render_markdown
from cli.experiments.reproduce.order import Order, Reproduction
from cli.experiments.reproduce.table import Table


class Written(NamedTuple):
    """A table, its page, and where both are."""

    table: Table
    page: str
    markdown_path: str
    json_path: str


def run_reproduction(reproduction: Reproduction, order: Order) -> Written:
    """Train, measure and write `NAME.md` and `NAME.json` into `order.out`; what is done is kept.

    Raises:
        KeyboardInterrupt: stopped; the same call goes on from there.
        KdCacheError: see the message.
    """
    table = reproduction.run(order)
    page = render_markdown(table)
    name = f"{table.name}-quick" if table.quick else table.name
    storage = LocalStorage(order.out)
    storage.put(f"{name}.md", page.encode())
    document = json.dumps(table.document(), indent=2, allow_nan=False)
    storage.put(f"{name}.json", f"{document}\n".encode())
    storage.sweep()
    out = Path(order.out)
    return Written(table, page, str(out / f"{name}.md"), str(out / f"{name}.json"))
