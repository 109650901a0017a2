"""The gateway is killed in the middle of writes, and started again: nothing half, nothing lost.

Only under `make test-s3`, which starts a gateway that may be killed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import s3
from support.builds import open_toy, record_toy, tree_bytes
from support.gateway import Gateway
from support.runs import curve, same, state_of
from support.streams import train_toys

from cache_service.recording.engines import prepare
from cache_service.recording.record import open_writer, record
from cache_service.storage import open_storage, retries

ONE_AT_A_TIME = threading.Lock()
"""Two restarts at once would start two gateways, of which one is lost sight of."""


@pytest.fixture
def server(monkeypatch):
    folder = os.environ.get("KD_CACHE_S3_GATEWAY")
    if folder is None:
        pytest.skip("no gateway that may be killed: make test-s3 starts one")
    for name, value in s3.real_environment().items():
        monkeypatch.setenv(name, value)
    return Gateway(folder)


def kill_and_restart(server, after_s):
    def act():
        with ONE_AT_A_TIME:
            time.sleep(after_s)
            server.kill_gateway()
            time.sleep(1)
            server.start_gateway()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def test_without_the_server_make_test_s3_names_the_packages_and_starts_nothing():
    runner = Path(__file__).parents[1] / "run_on_gateway.py"
    said = subprocess.run(
        [sys.executable, runner], env={"PATH": "/none"}, capture_output=True, text=True, check=False
    )
    assert said.returncode == 2
    assert said.stderr.startswith("not installed: ceph, ceph-mon, ceph-osd, ")
    assert "apt-get install --no-install-recommends radosgw" in said.stderr


@pytest.mark.faults
@pytest.mark.parametrize("after_s", [0.02, 0.1, 0.3])
def test_a_write_that_was_cut_off_is_repeated_and_the_object_is_whole(server, after_s):
    storage = open_storage(s3.new_prefix())
    storage.put("before", b"1")
    content = np.random.default_rng(0).bytes(48 << 20)
    thread = kill_and_restart(server, after_s)
    storage.put("large", content)
    storage.create("small", b"2")
    thread.join()
    assert storage.get("large") == content
    assert storage.list("") == ["before", "large", "small"]


@pytest.mark.faults
def test_a_build_goes_on_when_its_gateway_was_killed_at_every_second_shard(server, tmp_path):
    record_toy(str(tmp_path / "c"), scales=[1])
    url, threads = s3.new_prefix(), []

    def kill(progress):
        if progress.shards_committed in (1, 3) and len(threads) < progress.shards_committed:
            threads.append(kill_and_restart(server, 0.0))

    build = open_toy(url, scales=[1])
    prepare(build)
    record(build, open_writer(build), seeds=(0, 1), on_progress=kill)
    for thread in threads:
        thread.join()
    assert len(threads) >= 2
    storage = open_storage(url)
    assert {key: storage.get(key) for key in storage.list("")} == tree_bytes(tmp_path / "c")


@pytest.mark.faults
def test_a_student_goes_on_when_its_gateway_was_killed(server, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(retries, "WARN_AFTER_S", 0.1)
    record_toy(str(tmp_path / "c"))
    url = s3.new_prefix()
    record_toy(url)
    train_toys(tmp_path / "local", str(tmp_path / "c"))

    threads = []

    def kill(event):
        if event.kind == "step" and not threads:
            threads.append(kill_and_restart(server, 0.0))
            time.sleep(0.2)  # the seed is copied as it is needed: until the gateway is gone

    train_toys(tmp_path / "waited", {"url": url, "disk_cache": str(tmp_path / "copies")}, kill)
    assert "Retrying for " in caplog.text
    threads[0].join()
    assert curve(tmp_path / "waited") == curve(tmp_path / "local")
    same(state_of(tmp_path / "waited"), state_of(tmp_path / "local"))
