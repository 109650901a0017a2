"""Worker processes read the same rows however they start, or say why they cannot; none hangs."""

from __future__ import annotations

import pytest
from support import s3, workers

METHODS = ["fork", "forkserver", "spawn"]


# Each case starts a parent, and two workers twice: some seconds on two cores.
@pytest.mark.parametrize(
    ("codec", "method"), [*(("dense", method) for method in METHODS), ("dense-zstd", "fork")]
)
def test_workers_read_a_folder_however_they_start(write_once, codec, method):
    said = workers.ask(method, write_once(codec, "local"))
    same = said["parent"]
    assert ":" not in same
    assert said == {"lazy": [same] * 2, "parent": same, "used": [same] * 2, "after": same}


@pytest.mark.parametrize("method", METHODS)
def test_workers_read_a_bucket_or_are_refused_and_never_hang(write_once, method, monkeypatch):
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    said = workers.ask(method, write_once("dense", "s3-moto"))
    same = said["parent"]
    assert ":" not in same
    assert said["lazy"] == [same] * 2
    assert said["after"] == same, "the parent reads on, whatever became of its workers"
    if method == "fork":
        for words in said["used"]:
            assert words.startswith("storage: ")
            assert "forked after its parent had used S3" in words
            assert 'multiprocessing_context="forkserver"' in words
    else:
        assert said["used"] == [same] * 2
