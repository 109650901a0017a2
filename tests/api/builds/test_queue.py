"""The queue: who is next, what survives, and that one build is run by one server."""

from __future__ import annotations

import sqlite3
import threading

import pytest
from support.build_queue import wanted

from cache_service.api.builds.queue import (
    BuildError,
    BuildProgress,
    BuildQueue,
    NoSuchBuildError,
    QueueFullError,
)
from cache_service.errors import ConfigError, OutOfSpaceError, SpecMismatchError, StorageError

PROGRESS = BuildProgress(
    rows_done=32,
    rows_total=192,
    shards_done=1,
    shards_total=6,
    shards_committed=1,
    bytes_written=4000,
    rows_per_s=100.0,
    rows_answered=48,
    eta_s=1.6,
)
ENDED = PROGRESS.model_copy(update={"rows_answered": 32, "eta_s": None})
"""What is left of it when the build has ended: no open shards, and no time to go."""
ERROR = BuildError(code="dataset", status=422, detail="no.", hint="")


@pytest.fixture
def database(tmp_path):
    return tmp_path / "state" / "builds.sqlite"


@pytest.fixture
def queue(database):
    opened = BuildQueue(database)
    yield opened
    opened.close()


def submit(queue, *, max_queued=10, max_kept=10, **changes):
    return queue.submit(wanted(**changes), max_queued=max_queued, max_kept=max_kept)


def test_larger_priorities_go_first_and_equal_ones_in_the_order_of_asking(queue):
    names = [("a", 0), ("b", 5), ("c", -1), ("d", 5), ("e", 0)]
    for cache, priority in names:
        submit(queue, cache=cache, priority=priority)
    taken = [queue.claim(f"cuda:{number}").cache for number in range(5)]
    assert taken == ["b", "d", "a", "e", "c"]
    assert queue.claim("cuda:9") is None


def test_a_build_whose_rows_are_awaited_overtakes_every_priority(queue):
    submit(queue, cache="a", priority=100)
    awaited = submit(queue, cache="b", priority=-100)
    assert queue.prioritize("b", 1, [2, 0])
    assert queue.claim("cpu").id == awaited.id
    assert [shard for _, shard in queue.prioritized(awaited.id)] == [(1, 2), (1, 0)]
    (first, _), *_ = queue.prioritized(awaited.id)
    assert [shard for _, shard in queue.prioritized(awaited.id, after=first)] == [(1, 0)]


def test_shards_that_no_build_will_record_are_not_noted(queue):
    build = submit(queue, cache="a", seeds="0:2")
    assert not queue.prioritize("a", 2, [0])
    assert not queue.prioritize("b", 0, [0])
    assert queue.prioritized(build.id) == []
    queue.cancel(build.id)
    assert not queue.prioritize("a", 0, [0])


def test_asking_twice_for_one_shard_notes_it_once(queue):
    build = submit(queue)
    for _ in range(3):
        assert queue.prioritize("toy", 0, [1])
    assert len(queue.prioritized(build.id)) == 1


def test_one_build_at_a_time_runs_on_a_device_and_into_a_cache(queue):
    first = submit(queue, cache="a", seeds="0:2")
    submit(queue, cache="a", seeds="2:4")
    third = submit(queue, cache="b")
    assert queue.claim("cuda:0").id == first.id
    assert queue.claim("cuda:0") is None
    assert queue.claim("cuda:1").id == third.id
    assert queue.claim("cuda:2") is None
    queue.finish(first.id, "done")
    assert queue.claim("cuda:2").seeds == "2:4"


def test_the_same_request_is_the_same_build_until_it_ends(queue):
    first = submit(queue, priority=1)
    again = submit(queue, priority=4)
    assert (again.id, again.priority) == (first.id, 4)
    assert submit(queue, priority=0).priority == 4
    assert submit(queue, seeds="0:3").id != first.id
    queue.claim("cpu")
    assert submit(queue).id == first.id
    queue.finish(first.id, "failed", ERROR)
    assert submit(queue).id != first.id


def test_a_cache_that_is_queued_with_other_settings_is_refused_by_field(queue):
    submit(queue)
    with pytest.raises(SpecMismatchError, match=r'teacher = "tiny".*teacher = "wide"'):
        submit(queue, teacher="wide")
    with pytest.raises(SpecMismatchError, match=r"augment\.preset"):
        submit(queue, augment={"preset": "none", "size": 16})
    assert len(queue.newest()) == 1


def test_a_full_queue_refuses_and_running_builds_do_not_count(queue):
    submit(queue, cache="a", max_queued=1)
    with pytest.raises(QueueFullError, match="1 builds wait"):
        submit(queue, cache="b", max_queued=1)
    assert submit(queue, cache="a", max_queued=1)  # it waits already
    queue.claim("cpu")
    submit(queue, cache="b", max_queued=1)


def test_only_the_latest_ended_builds_are_remembered(queue):
    for number in range(5):
        build = submit(queue, cache=f"c{number}", max_kept=2)
        queue.claim("cpu")
        queue.finish(build.id, "done")
    waiting = submit(queue, cache="new", max_kept=2)
    assert [each.cache for each in queue.newest()] == ["new", "c4", "c3"]
    assert queue.counts() == {"done": 2, "queued": 1}
    assert queue.newest(limit=1)[0].id == waiting.id


def test_everything_said_of_a_build_survives_a_restart(queue, database):
    build = submit(queue, codec={"kind": "topk", "k": 3}, seeds=[5, "7:9"])
    queue.claim("cuda:1")
    queue.set_progress(build.id, PROGRESS)
    queue.finish(build.id, "failed", ERROR)
    before = queue.get(build.id)
    other = BuildQueue(database)
    after = other.get(build.id)
    other.close()
    assert after == before
    assert (after.state, after.progress, after.error) == ("failed", ENDED, ERROR)
    assert (after.seeds, after.device) == ("5:6, 7:9", "cuda:1")
    assert after.request == wanted(codec={"kind": "topk", "k": 3}, seeds=[5, 7, 8])
    assert after.created_s <= after.started_s <= after.finished_s


def test_builds_of_a_dead_server_are_queued_again_and_those_of_a_living_one_are_not(database):
    alive, dead, heir = (BuildQueue(database) for _ in range(3))
    kept = submit(alive, cache="kept")
    alive.claim("cpu")
    lost, canceled = submit(dead, cache="lost"), submit(dead, cache="canceled")
    dead.claim("cuda:0")
    dead.claim("cuda:1")
    dead.cancel(canceled.id)
    assert heir.recover() == 0
    dead.close()  # which is all that happens to a killed one
    assert heir.recover() == 2
    assert heir.get(lost.id).state == "queued"
    assert heir.get(canceled.id).state == "canceled"
    assert heir.get(kept.id).state == "running"
    assert heir.claim("cuda:0").id == lost.id
    alive.close()
    heir.close()


def test_a_server_that_lost_a_build_cannot_write_to_it(database):
    dead, heir = BuildQueue(database), BuildQueue(database)
    build = submit(dead)
    dead.claim("cpu")
    dead._server_locks.end(f"server-{dead.owner}")
    heir.recover()
    heir.claim("cpu")
    dead.finish(build.id, "failed", ERROR)
    dead.set_progress(build.id, PROGRESS)
    assert (heir.get(build.id).state, heir.get(build.id).progress) == ("running", None)
    dead._database.close()
    heir.close()


def test_servers_that_race_for_builds_share_them_without_a_double(database):
    queues = [BuildQueue(database) for _ in range(4)]
    for number in range(24):
        submit(queues[0], cache=f"c{number}", max_queued=30)
    taken, barrier = [], threading.Barrier(len(queues))

    def take(number):
        barrier.wait()
        for turn in range(12):
            found = queues[number].claim(f"cuda:{number}{turn:02d}")
            if found is not None:
                taken.append(found.id)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(len(queues))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(taken) == len(set(taken)) == 24
    for each in queues:
        each.close()


def test_canceling_ends_what_waits_and_asks_what_runs(queue):
    waits, runs = submit(queue, cache="a", priority=-1), submit(queue, cache="b")
    assert queue.claim("cpu").id == runs.id
    assert queue.cancel(waits.id).state == "canceled"
    asked = queue.cancel(runs.id)
    assert (asked.state, asked.canceling) == ("running", True)
    assert queue.cancel(runs.id).version == asked.version
    queue.finish(runs.id, "canceled")
    assert queue.cancel(runs.id).canceling is False
    with pytest.raises(NoSuchBuildError, match="has no build of that id"):
        queue.cancel("0" * 16)


def test_every_change_has_a_version_of_its_own(queue):
    build = submit(queue)
    versions = [build.version, queue.claim("cpu").version]
    queue.set_progress(build.id, PROGRESS)
    versions.append(queue.get(build.id).version)
    versions.append(queue.cancel(build.id).version)
    queue.finish(build.id, "canceled")
    versions.append(queue.get(build.id).version)
    assert versions == sorted(set(versions))


def test_a_database_of_a_newer_version_or_no_database_is_refused(tmp_path):
    newer = tmp_path / "newer.sqlite"
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(ConfigError, match="version 2; this program knows version 1"):
        BuildQueue(newer)
    other = tmp_path / "other.sqlite"
    other.write_bytes(b"no database at all, but a letter to somebody" * 100)
    with pytest.raises(ConfigError, match=r"other\.sqlite cannot be used"):
        BuildQueue(other)
    with pytest.raises(StorageError, match="cannot be used"):
        BuildQueue(tmp_path)
    assert not (tmp_path / ".scratch").exists()


def test_a_full_database_refuses_with_out_of_space_and_goes_on_afterwards(queue):
    kept = submit(queue, cache="kept")
    pages = queue._database.execute("PRAGMA page_count").fetchone()[0]
    queue._database.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(200):
        try:
            submit(queue, cache=f"c{number}", max_queued=1000, seeds="0:500")
        except OutOfSpaceError as refusal:
            assert "full" in refusal.message  # noqa: PT017  which of them it is, nobody knows
            break
    else:
        pytest.fail("nothing was refused")
    queue._database.execute("PRAGMA max_page_count = 100000")
    submit(queue, cache="after", max_queued=1000)
    assert queue.get(kept.id) == kept


def test_commits_of_the_queue_are_durable(queue):
    assert queue._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert queue._database.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_a_build_that_cannot_be_understood_is_a_refusal_not_a_crash(queue):
    build = submit(queue)
    queue._database.execute("UPDATE builds SET request = '{}'")
    for ask in (queue.newest, lambda: queue.get(build.id), lambda: queue.claim("cpu")):
        with pytest.raises(StorageError, match="does not understand"):
            ask()


def test_the_place_of_a_build_is_told_in_the_order_in_which_builds_run(queue):
    assert queue.place("a") is None
    first, second = submit(queue, cache="a"), submit(queue, cache="b")
    third = submit(queue, cache="c", priority=5)
    assert str(queue.place("c")) == f"Build {third.id} is number 1 of 3 in the queue."
    assert str(queue.place("b")) == f"Build {second.id} is number 3 of 3 in the queue."
    assert str(queue.place("a", 1)) == f"Build {first.id} is number 2 of 3 in the queue."
    assert queue.place("a", 99) is None
    queue.prioritize("b", 0, [0])
    assert queue.place("b").number == 1
    assert queue.claim("cpu").id == second.id
    assert str(queue.place("b")) == f"Build {second.id} has just started."
    assert (queue.place("c").number, queue.place("c").queued) == (1, 2)
    queue.set_progress(second.id, PROGRESS.model_copy(update={"eta_s": 12.0}))
    assert str(queue.place("b")) == (
        f"Build {second.id} is running: 32 of 192 rows, about 12.0 s left."
    )
    queue.cancel(second.id)
    assert queue.place("b") is None
