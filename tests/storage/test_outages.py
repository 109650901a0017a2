"""A bucket that does not answer for a while: builds and students wait, once said, and go on."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
from support import s3
from support.builds import open_toy, record_toy, tree_bytes
from support.ordered import QUICK
from support.runs import curve, same, state_of
from support.streams import train_toys

from cache_service.api.http import catalog
from cache_service.errors import StorageError
from cache_service.interrupts import stop_on_signal
from cache_service.recording.engines import prepare
from cache_service.recording.record import open_writer, record
from cache_service.storage import open_storage, retries
from cache_service.storage.retries import DEFAULT_RETRIES

ObjectStorage = pytest.importorskip("cache_service.storage.objects").ObjectStorage


@pytest.fixture
def bucket(monkeypatch):
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    with s3.counted_bucket(monkeypatch) as proxy:
        yield proxy


def down_for(bucket, seconds):
    bucket.is_down = True
    timer = threading.Timer(seconds, setattr, (bucket, "is_down", False))
    timer.start()
    return timer


def test_an_outage_is_borne_for_the_five_minutes_of_the_pages():
    assert DEFAULT_RETRIES.total_s == 300


def test_every_request_is_repeated_until_the_bucket_answers_and_the_outage_is_told_once(
    bucket, monkeypatch, caplog
):
    monkeypatch.setattr(retries, "WARN_AFTER_S", 0.1)
    storage = ObjectStorage(s3.new_prefix(), retries=QUICK)
    storage.put("a/b", b"content")
    requests = [
        (lambda: storage.get("a/b"), b"content"),
        (lambda: storage.get("none"), None),
        (lambda: storage.get_ranges("a/b", [(1, 3)]), [b"on"]),
        (lambda: storage.size("a/b"), 7),
        (lambda: storage.put("c", b"1"), None),
        (lambda: storage.create("a/b", b"2"), False),
        (lambda: storage.create("d", b"2"), True),
        (lambda: storage.delete("d"), None),
        (lambda: storage.list(""), ["a/b", "c"]),
        (storage.folders, ("a",)),
    ]
    for request, wanted in requests:
        caplog.clear()
        timer = down_for(bucket, 0.3)
        assert request() == wanted
        timer.join()
        (said,) = [each.message for each in caplog.records]
        assert "HTTP error" in said
        assert "Retrying for " in said


def test_what_the_bucket_refuses_and_a_wrong_address_are_told_soon(bucket, monkeypatch):
    storage = open_storage("s3://nobody-made-this-bucket/prefix")
    began = time.monotonic()
    with pytest.raises(StorageError, match="cannot write"):
        storage.put("a", b"")
    assert time.monotonic() - began < 1
    bucket.is_down = True
    brief = ObjectStorage(s3.new_prefix(), retries=QUICK._replace(first_s=0.2, total_s=3.0))
    began = time.monotonic()
    with pytest.raises(StorageError, match="cannot read"):
        brief.get("a")
    assert time.monotonic() - began < 2
    bucket.is_down = False
    assert brief.get("a") is None
    down_for(bucket, 2.0).join(0)
    assert brief.get("a") is None, "after its first answer, a bucket is asked for longer"


def test_a_service_gives_up_at_once_because_its_clients_wait(bucket):
    url = s3.new_prefix()
    root = catalog.Catalog(url, open_shards=4)
    bucket.is_down = True
    began = time.monotonic()
    with pytest.raises(StorageError, match="cannot list the root"):
        root.check()
    with pytest.raises(StorageError):
        root.open("name")
    assert time.monotonic() - began < 4


def test_a_build_waits_for_a_bucket_in_the_middle_and_records_the_same_bytes(bucket, tmp_path):
    record_toy(str(tmp_path / "c"), scales=[1])
    url, outages = s3.new_prefix(), []

    def fail_twice(progress):
        if progress.shards_committed in (1, 3) and len(outages) < progress.shards_committed:
            outages.append(down_for(bucket, 1.5))

    build = open_toy(url, scales=[1])
    prepare(build)
    assert record(build, open_writer(build), seeds=(0, 1), on_progress=fail_twice) == 6
    assert len(outages) >= 2
    for timer in outages:
        timer.join()
    storage = open_storage(url)
    assert {key: storage.get(key) for key in storage.list("")} == tree_bytes(tmp_path / "c")


def test_a_student_waits_for_a_bucket_in_the_middle_and_has_the_same_losses(
    bucket, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(retries, "WARN_AFTER_S", 0.1)
    record_toy(str(tmp_path / "c"))
    url = s3.new_prefix()
    record_toy(url)
    train_toys(tmp_path / "local", str(tmp_path / "c"))
    outages = []

    def fail(event):
        if event.kind == "step" and not outages:
            bucket.asked.clear()
            outages.append(down_for(bucket, 1.5))

    kept = {"url": url, "disk_cache": str(tmp_path / "copies")}
    train_toys(tmp_path / "waited", kept, fail)
    outages[0].join()
    assert "Retrying for " in caplog.text
    assert bucket.num_bytes() > 0, "the rows after the outage came from the bucket"
    assert curve(tmp_path / "waited") == curve(tmp_path / "local")
    same(state_of(tmp_path / "waited"), state_of(tmp_path / "local"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_wait_of_a_build_at_once(bucket, number):
    url, signals = s3.new_prefix(), []

    def stop(progress):
        if progress.shards_committed == 1 and not signals:
            bucket.is_down = True
            signals.append(time.monotonic() + 1.5)
            timer = threading.Timer(1.5, os.kill, (os.getpid(), number))
            timer.start()

    build = open_toy(url, scales=[1])
    prepare(build)
    with pytest.raises(KeyboardInterrupt):
        record(build, open_writer(build), seeds=(0, 1), on_progress=stop)
    assert time.monotonic() - signals[0] < 1.5
    bucket.is_down = False
    assert record(build, open_writer(build), seeds=(0, 1)) >= 4


def test_a_reader_that_waits_ends_at_a_signal(bucket):
    storage = open_storage(s3.new_prefix())
    storage.get("a")
    bucket.is_down = True
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt), stop_on_signal():
        storage.get("a")
    assert time.monotonic() - began < 3
