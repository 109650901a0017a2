"""What every storage does, and what none does."""

from __future__ import annotations

import contextlib
import pickle
import threading

import pytest
from support.races import content, winners_of_each_round
from support.s3 import SECRET

from cache_service.errors import ConfigError, StorageError
from cache_service.storage import open_storage

BODY = bytes(range(256)) * 4


def test_an_object_comes_back_as_it_was_put(storage):
    storage.put("logits/c/0/1", BODY)
    assert storage.get("logits/c/0/1") == BODY
    assert storage.size("logits/c/0/1") == len(BODY)


def test_an_empty_object_is_an_object(storage):
    storage.put("empty", b"")
    assert storage.get("empty") == b""
    assert storage.size("empty") == 0


def test_what_is_absent_is_none_and_not_an_error(storage):
    assert storage.get("nothing") is None
    assert storage.size("nothing") is None
    assert storage.get_ranges("nothing", [(0, 3)]) is None
    assert storage.map("nothing") is None
    assert storage.list("") == []
    assert storage.list("nothing/") == []
    storage.delete("nothing")


def test_a_part_of_a_key_is_not_an_object(storage):
    storage.put("a/b/c", BODY)
    assert storage.get("a/b") is None
    assert storage.size("a/b") is None
    assert storage.get_ranges("a/b", [(0, 3)]) is None
    assert storage.get("a/b/c/d") is None
    assert storage.size("a/b/c/d") is None


def test_putting_again_replaces(storage):
    storage.put("key", BODY)
    storage.put("key", b"shorter")
    assert storage.get("key") == b"shorter"


def test_creating_makes_an_object_only_where_there_is_none(storage):
    assert storage.create("commits/0/0.json", b"first") is True
    assert storage.create("commits/0/0.json", b"second") is False
    assert storage.get("commits/0/0.json") == b"first"


def test_ranges_come_back_in_the_order_asked_for(storage):
    storage.put("key", BODY)
    ranges = [(900, 1000), (0, 1), (10, 400), (300, 310), (0, 1)]
    assert storage.get_ranges("key", ranges) == [BODY[start:stop] for start, stop in ranges]
    assert storage.get_ranges("key", []) == []


def test_a_range_over_the_end_comes_back_short(storage):
    storage.put("key", BODY)
    assert storage.get_ranges("key", [(1000, 2000)]) == [BODY[1000:]]


def test_a_range_that_begins_at_the_end_is_empty_or_refused(storage):
    storage.put("key", BODY)
    with contextlib.suppress(StorageError):
        assert storage.get_ranges("key", [(1024, 2000)]) == [b""]


def test_what_is_deleted_is_gone_and_can_be_created_again(storage):
    storage.put("key", BODY)
    storage.delete("key")
    assert storage.get("key") is None
    assert storage.list("") == []
    assert storage.create("key", b"anew") is True


def test_listing_gives_the_keys_below_a_prefix_sorted(storage):
    for key in ("commits/10/0.json", "commits/9/0.json", "commits/9/10.json", "commits2/x", "b"):
        storage.put(key, b"")
    assert storage.list("commits/") == [
        "commits/10/0.json",
        "commits/9/0.json",
        "commits/9/10.json",
    ]
    assert storage.list("commits/9/") == ["commits/9/0.json", "commits/9/10.json"]
    assert storage.list("") == sorted(storage.list("")) != []


@pytest.mark.parametrize("key", ["with space", "100%2e%2e/x", "a#b?c=d&e", "Größe", "~x", "..x/y."])
def test_keys_of_any_letters_come_back(storage, key):
    storage.put(key, BODY)
    assert storage.get(key) == BODY
    assert storage.list("") == [key]


BAD_KEYS = [
    *("", "/", "/etc/hostname", "../x", "a/../../x", "a/..", "a//b", "a/", "./a", "."),
    *("a\\..\\x", "..\\x", "a\0b", "\ud800"),
]


@pytest.mark.parametrize("key", BAD_KEYS, ids=ascii)
def test_no_key_leaves_the_root(storage, key, tmp_path):
    (tmp_path / "x").write_bytes(b"outside")
    before = sorted(tmp_path.rglob("*"))
    for use in (
        storage.get,
        storage.size,
        storage.delete,
        lambda key: storage.get_ranges(key, [(0, 1)]),
        lambda key: storage.put(key, b"mine"),
        lambda key: storage.create(key, b"mine"),
    ):
        with pytest.raises(ConfigError, match="is not a valid"):
            use(key)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "x").read_bytes() == b"outside"


@pytest.mark.parametrize("prefix", ["../", "/", "a/../../", "commits", "\0/"], ids=ascii)
def test_no_prefix_leaves_the_root(storage, prefix):
    with pytest.raises(ConfigError, match=r"is not a valid (prefix|key)"):
        storage.list(prefix)


def test_a_reader_sees_an_object_whole_while_it_is_replaced(storage):
    bodies = [bytes([number]) * 300_000 for number in range(2)]
    storage.put("key", bodies[0])
    stop = threading.Event()

    def write() -> None:
        for turn in range(20):
            storage.put("key", bodies[turn % 2])
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not stop.is_set():
        assert storage.get("key") in bodies
    writer.join()


def test_a_pickled_storage_works_and_holds_no_secret(storage):
    storage.put("key", BODY)
    pickled = pickle.dumps(storage)
    assert SECRET.encode() not in pickled
    assert pickle.loads(pickled).get("key") == BODY


def check_exactly_one_wins(url, rounds):
    winners = winners_of_each_round(url, processes=12, rounds=rounds)
    assert [len(won) for won in winners] == [1] * rounds
    storage = open_storage(url)
    for each, (winner,) in enumerate(winners):
        assert storage.get(f"commits/{each}.json") == content(winner)
    assert len(storage.list("")) == rounds, "losers leave nothing behind"


# 12 processes import and start: some seconds on two cores.
def test_exactly_one_of_twelve_processes_creates_an_object(url):
    check_exactly_one_wins(url, rounds=3)


@pytest.mark.faults
def test_exactly_one_of_twelve_processes_creates_an_object_in_each_of_40_rounds(url):
    check_exactly_one_wins(url, rounds=40)


@pytest.mark.parametrize("url", ["ftp://host/x", "memory://", "S3://b"])
def test_an_unknown_scheme_is_refused_with_those_that_are_known(url):
    with pytest.raises(ConfigError, match=r"is unknown\. Use a path, s3://bucket/prefix"):
        open_storage(url)
