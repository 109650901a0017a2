"""`verify` by several processes, of a part, and of a sample finds what one process finds in all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from support import holders, s3
from support.caches import make_spec, write_cache
from support.command import kd_cache

from cache_service.errors import WorkersError
from cache_service.format.commit import commit_key
from cache_service.rows import verify
from cache_service.rows.reader import open_cache
from cache_service.rows.verify import choose_shards, verify_cache

CODECS = [{"kind": "dense"}, {"kind": "topk", "k": 4, "compression": "zstd"}]


def flip_bits(root, spec, rng) -> set[tuple[int, int]]:
    """Flip a random bit in one object of about every third shard. Returns these shards."""
    layout, hit = open_cache(str(root)).layout, set()
    for seed in range(2):
        for shard in range(spec.num_shards):
            if rng.random() < 0.35:
                keys = [*layout.object_keys(seed, shard).values(), commit_key(seed, shard)]
                path = root / rng.choice(keys)
                content = bytearray(path.read_bytes())
                content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
                path.write_bytes(content)
                hit.add((seed, shard))
    return hit


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec["kind"])
@pytest.mark.timeout(120)
def test_flipped_bits_are_found_alike_by_one_process_by_several_and_in_parts(tmp_path, codec):
    spec = make_spec(codec=codec, num_samples=120, shard_rows=16)
    rng = np.random.default_rng(5)
    write_cache(str(tmp_path), spec, range(2))
    cache = open_cache(str(tmp_path))
    hit = flip_bits(tmp_path, spec, rng)
    alone = verify_cache(cache)
    assert {(seed, shard) for seed, shard, _ in alone.damaged} == hit
    assert 2 < len(hit) < 14
    assert verify_cache(cache, processes=3) == alone
    parts = [verify_cache(cache, part=(index, 3)) for index in range(3)]
    assert sorted(damage for each in parts for damage in each.damaged) == alone.damaged
    assert sum(each.rows_checked for each in parts) == alone.rows_checked
    assert sum(each.shards_recorded for each in parts) == 2 * spec.num_shards


@pytest.mark.parametrize(
    ("sample", "chosen"),
    [
        (None, range(100)),
        (0.01, [50]),
        (0.02, [25, 75]),
        (0.05, [10, 30, 50, 70, 90]),
        (1, [50]),  # one row
        (33, [25, 75]),  # rows of two shards
        (1e9, range(100)),
        (float("inf"), range(100)),
    ],
)
def test_a_sample_is_evenly_spaced_and_the_same_every_time(sample, chosen):
    spec = make_spec(num_samples=50 * 32)
    recorded = [(seed, shard) for seed in (3, 7) for shard in range(50)]
    found = choose_shards(spec, recorded, sample)
    assert found == [recorded[number] for number in chosen]
    assert choose_shards(spec, [], sample) == []


def test_a_sample_reads_nothing_else_says_so_and_still_counts_what_is_missing(tmp_path):
    spec = make_spec(num_samples=10 * 32)
    write_cache(str(tmp_path), spec, range(2))
    (tmp_path / "sample/c/0/0").unlink()  # not of the sample
    ended = kd_cache("verify", str(tmp_path), "--sample", "0.1")
    assert ended.code == 0
    assert "64 rows in 2 shards are intact; a sample: 2 of 20 recorded shards" in ended.out
    (tmp_path / "sample/c/1/5").unlink()
    assert verify_cache(open_cache(str(tmp_path)), sample=0.1).sample == [(0, 5), (1, 5)]
    ended = kd_cache("verify", str(tmp_path), "--sample", "0.1")
    assert ended.code == 3
    assert "damaged: seed 1 shard 5" in ended.out
    assert "32 rows in 1 shards are intact" in ended.out
    (tmp_path / "commits/1/9.json").unlink()
    ended = kd_cache("verify", str(tmp_path), "--shard", "1/19", "--sample", "0.5")
    assert ended.code == 4
    assert "incomplete: seed 1 lacks 1 shards" in ended.out
    assert "part 1/19" in ended.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--sample", "0"), "--sample 0 is not positive"),
        (("--sample", "-3"), "--sample -3 is not positive"),
        (("--sample", "nan"), "--sample nan is not positive"),
        (("--shard", "5/4"), "there are 4 parts"),
        (("--shard", "half"), "not of the form i/n"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(tmp_path, options, says):
    ended = kd_cache("verify", str(tmp_path), *options)
    assert ended.code == 2
    assert says in ended.err


def test_a_process_that_dies_is_told_in_one_line(tmp_path, monkeypatch):
    write_cache(str(tmp_path), make_spec(num_samples=3 * 32), range(1))
    monkeypatch.setattr(verify, "_check_opened", holders.die)
    with pytest.raises(WorkersError, match="a process that checked shards died"):
        verify_cache(open_cache(str(tmp_path)), processes=2)


COMMAND = "from cli.main import run; run()"


@pytest.fixture(scope="module")
def many_chunks(tmp_path_factory):
    """A cache of 16 shards; its 400,000 chunks take seconds, also by two processes."""
    folder = tmp_path_factory.mktemp("many")
    spec = make_spec(num_samples=100_000, shard_rows=6250, chunk_rows=1, scales=(1,))
    write_cache(str(folder), spec, range(1))
    return folder


@pytest.mark.parametrize("how", ["Ctrl-C at the start", "Ctrl-C", "SIGTERM", "SIGKILL"])
@pytest.mark.timeout(120)
def test_an_interrupt_ends_every_process_at_once_and_without_a_traceback(many_chunks, how):
    child = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "verify", str(many_chunks), "--processes", "2"],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if how != "Ctrl-C at the start":
        assert '"event": "verified"' in child.stderr.readline()
    while len(workers := psutil.Process(child.pid).children(recursive=True)) < 2:
        time.sleep(0.01)
    if how == "Ctrl-C at the start":
        time.sleep(0.3)  # in the middle of their imports
    if how.startswith("Ctrl-C"):  # which a terminal sends to every process
        os.killpg(child.pid, signal.SIGINT)
    else:
        child.send_signal(getattr(signal, how))
    _, errors = child.communicate(timeout=60)
    assert child.returncode == (-9 if how == "SIGKILL" else 130)
    assert "Traceback" not in errors
    patience = time.monotonic() + 20
    while any(worker.is_running() for worker in workers) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(worker.is_running() for worker in workers)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec["kind"])
def test_a_bucket_is_asked_once_for_each_object(monkeypatch, codec):
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    url, spec = s3.new_prefix(), make_spec(codec=codec, num_samples=64, shard_rows=32)
    write_cache(url, spec, range(1))
    cache = open_cache(url)
    with s3.counted_bucket(monkeypatch) as bucket:
        report = verify_cache(open_cache(url))
    assert (report.rows_checked, report.complete) == (64, [0])
    of_shards = [
        asked
        for asked in bucket.asked
        if "list-type" not in asked.target
        and ("/c/" in asked.target or "/commits/0/" in asked.target)
    ]
    assert len(of_shards) == 2 * (len(cache.layout.arrays) + 2)
    assert bucket.by_kind()["HEAD"] == 0
