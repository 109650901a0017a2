"""What is true of buckets only: clients and processes, secrets, servers that are down."""

from __future__ import annotations

import os
import time

import pytest
from support import s3

from cache_service.errors import StorageError
from cache_service.storage import open_storage
from cache_service.storage.retries import NO_RETRIES


@pytest.fixture
def unreachable(monkeypatch):
    pytest.importorskip("obstore", reason="obstore is not installed")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    from cache_service.storage.objects import ObjectStorage

    return ObjectStorage("s3://bucket/prefix", retries=NO_RETRIES)


def test_a_server_that_is_down_is_told_within_seconds_and_without_the_secret(unreachable):
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/prefix/zarr\.json") as refusal:
        unreachable.get("zarr.json")
    assert time.monotonic() - began < 10
    assert "\n" not in str(refusal.value)
    assert s3.SECRET not in str(refusal.value) + repr(unreachable) + repr(vars(unreachable))


def test_a_bucket_that_does_not_exist_holds_nothing(monkeypatch):
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    storage = open_storage("s3://nobody-made-this-bucket/prefix")
    assert storage.get("zarr.json") is None
    with pytest.raises(StorageError, match="cannot write"):
        storage.put("zarr.json", b"{}")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_process_forked_after_a_first_use_is_refused_and_does_not_hang(unreachable):
    with pytest.raises(StorageError, match="cannot read"):
        unreachable.get("zarr.json")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            open_storage("s3://another/bucket").get("zarr.json")
        except StorageError as refusal:
            os.write(writer, str(refusal).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    assert "forked after its parent had used S3: the request would hang" in said
    assert 'multiprocessing_context="forkserver"' in said
