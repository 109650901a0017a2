"""A crash between any two writes leaves what was committed whole, and the rest refused.

The writes of a build are recorded, and every state in which they could have stopped is made anew:
each prefix, and each state that lacks one write out of the middle (a write that a lying disk lost).
"""

from __future__ import annotations

import pytest
from support.caches import make_spec, open_writer, write_shard
from support.everything import Expected, files_of, outcome, shard_outcomes
from support.storages import RecordingStorage, replay

CODECS = {
    "dense": {"kind": "dense"},
    "features": {"kind": "features", "num_channels": 6, "compression": "zstd"},
}


def record_two_seeds(root, spec):
    """The writes of one seed of four shards, and later of another."""
    storage = RecordingStorage(str(root))
    for seed in range(2):
        writer = open_writer(storage, spec, seed + 1)
        for shard in range(spec.num_shards):
            write_shard(writer, seed, shard)
    return storage.operations


@pytest.fixture(params=CODECS.values(), ids=CODECS.keys())
def build(request, tmp_path):
    spec = make_spec(codec=request.param, num_samples=50, shard_rows=16)
    return spec, record_two_seeds(tmp_path / "build", spec)


def commits_among(operations):
    return sum(
        key.endswith(".json") and key.startswith("commits/") and key[8].isdigit()
        for _, key, _ in operations
    )


def test_every_prefix_of_a_build_is_whole_as_far_as_it_is_committed(build, tmp_path):
    spec, operations = build
    expected = Expected(spec, 2)
    for count in range(len(operations) + 1):
        root = tmp_path / f"prefix-{count}"
        replay(operations[:count], root)
        said = shard_outcomes(str(root), expected)
        assert "wrong" not in said
        assert said.count("whole") == commits_among(operations[:count]), f"after {count} writes"
        others = [words for words in said if words != "whole"]
        assert all(words.startswith(("rows_not_built", "not_a_cache")) for words in others)
    assert outcome(str(root), expected) == "whole"


def test_a_build_that_lost_any_one_write_is_refused_unless_no_row_needs_it(build, tmp_path):
    spec, operations = build
    expected = Expected(spec, 2)
    unseen = []
    for lost, (_, key, _) in enumerate(operations):
        root = tmp_path / f"without-{lost}"
        replay(operations[:lost] + operations[lost + 1 :], root)
        said = shard_outcomes(str(root), expected)
        assert "wrong" not in said
        if said == ["whole"] * len(said):
            unseen.append(key)
    # Either write of an array's document may go missing: they differ in the number of seeds, which
    # Zarr tools go by, and rows are found through commits. Nor does a row need the commits' group.
    keys = [key for _, key, _ in operations]
    twice = [key for key in keys if keys.count(key) == 2]
    assert all(key.endswith("/zarr.json") for key in twice)
    assert sorted(unseen) == sorted([*twice, "commits/zarr.json"])


def test_the_same_build_again_finishes_any_prefix_to_the_same_bytes(build, tmp_path):
    spec, operations = build
    replay(operations, tmp_path / "whole")
    wanted = {
        path.relative_to(tmp_path / "whole"): path.read_bytes()
        for path in files_of(tmp_path / "whole")
    }
    for count in range(0, len(operations), 9):
        root = tmp_path / f"resumed-{count}"
        replay(operations[:count], root)
        writer = open_writer(str(root), spec, 2)
        repeated = 0
        for seed in range(2):
            for shard in range(spec.num_shards):
                repeated += write_shard(writer, seed, shard)
        writer.storage.sweep()
        found = {path.relative_to(root): path.read_bytes() for path in files_of(root)}
        assert found == wanted, f"resumed after {count} writes"
        assert repeated == 2 * spec.num_shards - commits_among(operations[:count])
