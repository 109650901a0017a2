"""The queue: who is next, what survives, and that one build is run by one server."""

from __future__ import annotations

import sqlite3
import threading

import pytest
from support.build_queue import wanted

from cache_service.api.builds.errors import NoSuchBuildError, QueueFullError
from cache_service.api.builds.states import BuildError, BuildProgress
from cache_service.api.builds.store import BuildStore
from cache_service.errors import ConfigError, OutOfSpaceError, SpecMismatchError, StorageError
from cache_service.recording.jobs import Shard

PROGRESS = BuildProgress(
    rows_done=32,
    rows_total=192,
    shards_done=1,
    shards_total=6,
    shards_committed=1,
    bytes_written=4000,
    rows_per_s=100.0,
    eta_s=1.6,
)
ERROR = BuildError(code="dataset", status=422, detail="no.", hint="")


@pytest.fixture
def database(tmp_path):
    return tmp_path / "state" / "builds.sqlite"


@pytest.fixture
def store(database):
    opened = BuildStore(database)
    yield opened
    opened.close()


def submit(store, *, max_queued=10, max_kept=10, **changes):
    return store.submit(wanted(**changes), max_queued=max_queued, max_kept=max_kept)


def test_larger_priorities_go_first_and_equal_ones_in_the_order_of_asking(store):
    names = [("a", 0), ("b", 5), ("c", -1), ("d", 5), ("e", 0)]
    for cache, priority in names:
        submit(store, cache=cache, priority=priority)
    taken = [store.claim(f"cuda:{number}").cache for number in range(5)]
    assert taken == ["b", "d", "a", "e", "c"]
    assert store.claim("cuda:9") is None


def test_a_build_whose_rows_are_awaited_overtakes_every_priority(store):
    submit(store, cache="a", priority=100)
    awaited = submit(store, cache="b", priority=-100)
    assert store.await_shards("b", [Shard(1, 2), Shard(1, 0)])
    assert store.claim("cpu").id == awaited.id
    assert [shard for _, shard in store.awaited(awaited.id)] == [(1, 2), (1, 0)]
    (first, _), *_ = store.awaited(awaited.id)
    assert [shard for _, shard in store.awaited(awaited.id, after=first)] == [(1, 0)]


def test_shards_that_no_build_will_record_are_not_noted(store):
    build = submit(store, cache="a", seeds="0:2")
    assert not store.await_shards("a", [Shard(2, 0)])
    assert not store.await_shards("b", [Shard(0, 0)])
    assert store.awaited(build.id) == []
    store.cancel(build.id)
    assert not store.await_shards("a", [Shard(0, 0)])


def test_asking_twice_for_one_shard_notes_it_once(store):
    build = submit(store)
    for _ in range(3):
        assert store.await_shards("toy", [Shard(0, 1)])
    assert len(store.awaited(build.id)) == 1


def test_one_build_at_a_time_runs_on_a_device_and_into_a_cache(store):
    first = submit(store, cache="a", seeds="0:2")
    submit(store, cache="a", seeds="2:4")
    third = submit(store, cache="b")
    assert store.claim("cuda:0").id == first.id
    assert store.claim("cuda:0") is None
    assert store.claim("cuda:1").id == third.id
    assert store.claim("cuda:2") is None
    store.finish(first.id, "done")
    assert store.claim("cuda:2").seeds == "2:4"


def test_the_same_request_is_the_same_build_until_it_ends(store):
    first = submit(store, priority=1)
    again = submit(store, priority=4)
    assert (again.id, again.priority) == (first.id, 4)
    assert submit(store, priority=0).priority == 4
    assert submit(store, seeds="0:3").id != first.id
    store.claim("cpu")
    assert submit(store).id == first.id
    store.finish(first.id, "failed", ERROR)
    assert submit(store).id != first.id


def test_a_cache_that_is_queued_with_other_settings_is_refused_by_field(store):
    submit(store)
    with pytest.raises(SpecMismatchError, match=r'teacher = "tiny".*teacher = "wide"'):
        submit(store, teacher="wide")
    with pytest.raises(SpecMismatchError, match=r"augment\.preset"):
        submit(store, augment={"preset": "none", "size": 16})
    assert len(store.newest()) == 1


def test_a_full_queue_refuses_and_running_builds_do_not_count(store):
    submit(store, cache="a", max_queued=1)
    with pytest.raises(QueueFullError, match="1 builds wait"):
        submit(store, cache="b", max_queued=1)
    assert submit(store, cache="a", max_queued=1)  # it waits already
    store.claim("cpu")
    submit(store, cache="b", max_queued=1)


def test_only_the_latest_ended_builds_are_remembered(store):
    for number in range(5):
        build = submit(store, cache=f"c{number}", max_kept=2)
        store.claim("cpu")
        store.finish(build.id, "done")
    waiting = submit(store, cache="new", max_kept=2)
    assert [each.cache for each in store.newest()] == ["new", "c4", "c3"]
    assert store.counts() == {"done": 2, "queued": 1}
    assert store.newest(limit=1)[0].id == waiting.id


def test_everything_said_of_a_build_survives_a_restart(store, database):
    build = submit(store, codec={"kind": "topk", "k": 3}, seeds=[5, "7:9"])
    store.claim("cuda:1")
    store.note(build.id, PROGRESS)
    store.finish(build.id, "failed", ERROR)
    before = store.get(build.id)
    other = BuildStore(database)
    after = other.get(build.id)
    other.close()
    assert after == before
    assert (after.state, after.progress, after.error) == ("failed", PROGRESS, ERROR)
    assert (after.seeds, after.device) == ("5:6, 7:9", "cuda:1")
    assert after.request == wanted(codec={"kind": "topk", "k": 3}, seeds=[5, 7, 8])
    assert after.created_s <= after.started_s <= after.finished_s


def test_builds_of_a_dead_server_are_queued_again_and_those_of_a_living_one_are_not(database):
    alive, dead, heir = (BuildStore(database) for _ in range(3))
    kept = submit(alive, cache="kept")
    alive.claim("cpu")
    lost, canceled = submit(dead, cache="lost"), submit(dead, cache="canceled")
    dead.claim("cuda:0")
    dead.claim("cuda:1")
    dead.cancel(canceled.id)
    assert heir.recover() == 0
    dead.close()  # which is all that the kernel does for a killed one
    assert heir.recover() == 2
    assert heir.get(lost.id).state == "queued"
    assert heir.get(canceled.id).state == "canceled"
    assert heir.get(kept.id).state == "running"
    assert heir.claim("cuda:0").id == lost.id
    alive.close()
    heir.close()


def test_a_server_that_lost_a_build_cannot_write_to_it(database):
    dead, heir = BuildStore(database), BuildStore(database)
    build = submit(dead)
    dead.claim("cpu")
    dead._alive.end(f"server-{dead.owner}")
    heir.recover()
    heir.claim("cpu")
    dead.finish(build.id, "failed", ERROR)
    dead.note(build.id, PROGRESS)
    assert (heir.get(build.id).state, heir.get(build.id).progress) == ("running", None)
    dead._database.close()
    heir.close()


def test_servers_that_race_for_builds_share_them_without_a_double(database):
    stores = [BuildStore(database) for _ in range(4)]
    for number in range(24):
        submit(stores[0], cache=f"c{number}", max_queued=30)
    taken, barrier = [], threading.Barrier(len(stores))

    def take(number):
        barrier.wait()
        for turn in range(12):
            found = stores[number].claim(f"cuda:{number}{turn:02d}")
            if found is not None:
                taken.append(found.id)

    crew = [threading.Thread(target=take, args=(number,)) for number in range(len(stores))]
    for each in crew:
        each.start()
    for each in crew:
        each.join()
    assert len(taken) == len(set(taken)) == 24
    for each in stores:
        each.close()


def test_canceling_ends_what_waits_and_asks_what_runs(store):
    waits, runs = submit(store, cache="a", priority=-1), submit(store, cache="b")
    assert store.claim("cpu").id == runs.id
    assert store.cancel(waits.id).state == "canceled"
    asked = store.cancel(runs.id)
    assert (asked.state, asked.canceling) == ("running", True)
    assert store.cancel(runs.id).version == asked.version
    store.finish(runs.id, "canceled")
    assert store.cancel(runs.id).canceling is False
    with pytest.raises(NoSuchBuildError):
        store.cancel("0" * 16)


def test_every_change_has_a_version_of_its_own(store):
    build = submit(store)
    versions = [build.version, store.claim("cpu").version]
    store.note(build.id, PROGRESS)
    versions.append(store.get(build.id).version)
    versions.append(store.cancel(build.id).version)
    store.finish(build.id, "canceled")
    versions.append(store.get(build.id).version)
    assert versions == sorted(set(versions))


def test_a_database_of_a_newer_version_or_no_database_is_refused(tmp_path):
    newer = tmp_path / "newer.sqlite"
    connection = sqlite3.connect(newer)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(ConfigError, match="version 2; this program knows version 1"):
        BuildStore(newer)
    other = tmp_path / "other.sqlite"
    other.write_bytes(b"no database at all, but a letter to somebody" * 100)
    with pytest.raises(ConfigError, match=r"other\.sqlite cannot be used"):
        BuildStore(other)
    with pytest.raises(StorageError, match="cannot be used"):
        BuildStore(tmp_path)
    assert not (tmp_path / ".scratch").exists()


def test_a_full_database_refuses_with_out_of_space_and_goes_on_afterwards(store):
    kept = submit(store, cache="kept")
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count = {pages}")
    for number in range(200):
        try:
            submit(store, cache=f"c{number}", max_queued=1000, seeds="0:500")
        except OutOfSpaceError as refusal:
            assert "full" in refusal.message  # noqa: PT017  which of them it is, nobody knows
            break
    else:
        pytest.fail("nothing was refused")
    store._database.execute("PRAGMA max_page_count = 100000")
    submit(store, cache="after", max_queued=1000)
    assert store.get(kept.id) == kept


def test_commits_of_the_queue_are_durable(store):
    assert store._database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert store._database.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_a_build_that_cannot_be_understood_is_a_refusal_not_a_crash(store):
    build = submit(store)
    store._database.execute("UPDATE builds SET request = '{}'")
    for ask in (store.newest, lambda: store.get(build.id), lambda: store.claim("cpu")):
        with pytest.raises(StorageError, match="does not understand"):
            ask()
