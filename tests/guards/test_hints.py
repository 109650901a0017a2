"""No message tells a user to delete something: a checkpoint or an image may be the only copy."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

HARMFUL = re.compile(
    r"\b(delete|remove|erase|overwrite|wipe|unlink|discard|rm)\b(?!\s+FROM)", re.IGNORECASE
)


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Texts of hints and of raised errors in a file, each with its line."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.keyword) and node.arg == "hint":
            parts = [node.value]
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            parts = list(node.exc.args)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            parts = [node.value] if is_hint_constant(node) else []
        for part in parts:
            for each in ast.walk(part):
                if isinstance(each, ast.Constant) and isinstance(each.value, str):
                    yield each.lineno, each.value


def is_hint_constant(node: ast.Assign | ast.AnnAssign) -> bool:
    """Texts in capitals, such as REPAIR, are used as hints."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return isinstance(node.value, ast.Constant) and any(
        isinstance(target, ast.Name) and target.id.isupper() for target in targets
    )


def test_no_message_advises_to_delete():
    files = [
        path
        for package in ("cache_service", "distill", "cli")
        for path in (ROOT / package).rglob("*.py")
    ]
    harmful = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        for line, text in messages(path)
        if HARMFUL.search(text)
    ]
    assert not harmful
    assert len(files) > 100
