"""Ways in which stored bytes come to harm."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache_service.rows.reader import open_cache
from support.everything import Expected, files_of, outcome


@contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """The file with other content (None: without it) for a while."""
    before = path.read_bytes()
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flip_and_read(root: Path, expected: Expected, *, flips: int, seed: int) -> Counter[str]:
    """Flip one random bit of one random file at a time, and read everything each time.

    Files are drawn first, so that the small ones that rule the large ones get their share.
    """
    draw, files = random.Random(seed), files_of(root)
    said: Counter[str] = Counter()
    for _ in range(flips):
        path = draw.choice(files)
        content = bytearray(path.read_bytes())
        bit = draw.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        with changed(path, bytes(content)):
            words = outcome(str(root), expected)
        kind = words if words in ("whole", "wrong") else "refused"
        said[kind] += 1
        assert kind != "wrong", f"bit {bit} of {path} was flipped and nothing noticed"
    return said


def exchange(one: Path, other: Path) -> None:
    """Each file in the other's place."""
    first = one.read_bytes()
    shutil.copyfile(other, one)
    other.write_bytes(first)


def damage_rows(folder: Path, seeds: tuple[int, ...] = (0, 1)) -> None:
    """Flip a bit in every row of logits of these seeds."""
    cache = open_cache(str(folder))
    for seed in seeds:
        for shard in cache.commits()[seed]:
            path = folder / cache.layout.object_key("logits", seed, shard)
            content = bytearray(path.read_bytes())
            content[::64] = bytes(byte ^ 1 for byte in content[::64])
            path.write_bytes(content)
