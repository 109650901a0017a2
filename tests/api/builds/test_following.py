"""A build with its real worker, and rows that are asked for before they are recorded."""

from __future__ import annotations

import time

import numpy as np
import pytest
from support.build_queue import builds_document, request_document, until
from support.serving import serving

from cache_service.remote.source import open_source
from cache_service.rows.reader import open_cache

SEEDS, SHARDS = 12, 3
NUM_SAMPLES = 96


class Followed:
    """One build that is read while it runs: its server, its folder, and what was read."""

    def __init__(self, server, root):
        self.server, self.root = server, root
        self.id = server.ask(
            "POST", "/v1/builds", json=request_document(seeds=f"0:{SEEDS}")
        ).json()["id"]
        until(lambda: server.ask("GET", "/v1/caches/toy").status == 200)
        self.planned = server.ask("GET", "/v1/caches/toy").json()["num_seeds"]
        self.recorded_before = self.num_commits()
        # The last shard of the last seed, then what a trainer would read, from the first row on.
        path = f"/v1/caches/toy/rows?seed={SEEDS - 1}&start=70&stop=96"
        begun = time.monotonic()
        self.refused = server.ask("GET", path)
        self.awaited = server.ask("GET", path + "&wait=60")
        self.waited_s = time.monotonic() - begun
        self.recorded_then = self.num_commits()
        follower = open_source(server.cache_url("toy"), wait_s=60.0)
        self.rows = [follower.read(seed, 0, NUM_SAMPLES) for seed in range(SEEDS)]
        self.build = until(lambda: (b := self.shown())["state"] != "running" and b)

    def shown(self):
        return self.server.ask("GET", f"/v1/builds/{self.id}").json()

    def num_commits(self):
        return len(list(self.root.glob("toy/commits/*/*.json")))

    def order(self):
        """(seed, shard) in the order in which they were committed."""
        files = self.root.glob("toy/commits/*/*.json")
        found = sorted((f.stat().st_mtime_ns, int(f.parent.name), int(f.stem)) for f in files)
        return [(seed, shard) for _, seed, shard in found]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    root = tmp_path_factory.mktemp("followed")
    # Small batches, so that the build takes a few seconds beside its reader.
    with serving(root, builds=builds_document(batch_size=2)) as server:
        yield Followed(server, root)


def test_every_seed_is_planned_before_the_first_one_is_recorded(followed):
    assert followed.planned == SEEDS
    assert followed.recorded_before < SEEDS * SHARDS


def test_rows_that_are_not_recorded_yet_are_answered_as_soon_as_they_are(followed):
    assert followed.refused.status == 503
    assert followed.refused.json()["code"] == "rows_not_built"
    assert int(followed.refused.headers["retry-after"]) > 0
    assert followed.awaited.status == 200
    assert followed.recorded_then < SEEDS * SHARDS  # the build was not waited for


def test_the_awaited_last_shard_is_recorded_before_the_middle_ones(followed):
    order = followed.order()
    assert sorted(order) == [(seed, shard) for seed in range(SEEDS) for shard in range(SHARDS)]
    turn = order.index((SEEDS - 1, SHARDS - 1))
    assert turn < len(order) - SHARDS
    middle = [each for each in order[turn:] if each[0] in range(SEEDS // 2, SEEDS - 1)]
    assert len(middle) >= SHARDS


def test_who_follows_a_build_reads_the_rows_of_who_came_later(followed):
    assert followed.build["state"] == "done", followed.build
    later = open_cache(str(followed.root / "toy"))
    for seed, rows in enumerate(followed.rows):
        whole = later.read(seed, 0, NUM_SAMPLES)
        assert rows.keys() == whole.keys()
        for name, values in whole.items():
            np.testing.assert_array_equal(rows[name], values)
    path = f"/v1/caches/toy/rows?seed={SEEDS - 1}&start=70&stop=96"
    assert followed.server.ask("GET", path).data == followed.awaited.data


def test_progress_ends_with_every_row_and_shard(followed):
    progress = followed.build["progress"]
    assert progress["rows_done"] == progress["rows_total"] == SEEDS * NUM_SAMPLES
    assert progress["shards_done"] == progress["shards_total"] == SEEDS * SHARDS
    assert progress["rows_per_s"] > 0


def test_rows_that_no_build_will_record_are_not_awaited(followed):
    begun = time.monotonic()
    path = f"/v1/caches/toy/rows?seed={SEEDS}&start=0&stop=1&wait=20"
    assert followed.server.ask("GET", path).status == 404
    assert time.monotonic() - begun < 5
