"""A server of small caches, one for the session: complete, half built, damaged, and foreign."""

from __future__ import annotations

import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from support.caches import make_rows, make_spec, open_writer, write_cache, write_shard
from support.serving import serving

ZSTD = {"kind": "topk", "k": 4, "compression": "zstd"}

SECRET = b"from outside of the root"


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Folder of caches, with things beside and in it that nobody may be sent."""
    folder = tmp_path_factory.mktemp("outside") / "root"
    folder.mkdir()
    (folder.parent / "secret.txt").write_bytes(SECRET)
    (folder.parent / "elsewhere").mkdir()
    write_cache(str(folder.parent / "elsewhere" / "cache"), make_spec(), range(1))
    (folder / "linked").symlink_to(folder.parent / "elsewhere" / "cache")
    (folder / "stray.txt").write_bytes(SECRET)
    write_cache(str(folder / "dense"), make_spec(), range(2))
    write_cache(str(folder / "zstd"), make_spec(codec=ZSTD), range(1))
    features = make_spec(codec={"kind": "features", "num_channels": 6})
    write_cache(str(folder / "features"), features, range(1))
    half = open_writer(str(folder / "half"), make_spec(), 2)
    for shard in (0, 2):
        write_shard(half, 0, shard, rows=make_rows(half.spec, 0))
    return folder


@pytest.fixture(scope="session")
def server(root):
    with serving(root) as running:
        yield running
