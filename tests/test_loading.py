"""Worker processes that die, hang or cannot start: one line within seconds."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cache_service import loading
from cache_service.errors import WorkersError
from cache_service.interrupts import StoppedWaitingError, stop_on_signal
from cache_service.loading import load_ahead

SLOW_START_S = 60
"""A worker imports torch; under load that takes its time."""


def die(key):
    if key == 3:
        os._exit(7)
    return torch.full((4,), key)


def be_killed(key):
    if key == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.full((4,), key)


def hit_a_full_memory(key):
    os.kill(os.getpid(), signal.SIGBUS)


def hang(key):
    time.sleep(SLOW_START_S)


def hang_later(key):
    if key:
        hang(key)
    return torch.zeros(1)


def make_large(key):
    return {"views": torch.zeros(40 * 2**20, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (die, "died with exit code 7"),
        (be_killed, "was killed, likely because memory ran out"),
        (hit_a_full_memory, "died of a bus error: /dev/shm is full"),
    ],
)
def test_a_dead_worker_is_reported_within_seconds_and_not_after_the_timeout(make, says):
    started = time.monotonic()
    with pytest.raises(WorkersError, match=says) as refusal:
        list(load_ahead(make, range(10), workers=1))
    assert time.monotonic() - started < SLOW_START_S
    assert "Set workers: 0" in refusal.value.hint
    assert refusal.value.exit_code == 4


def test_a_hung_worker_is_reported_after_the_timeout():
    with pytest.raises(WorkersError, match="alive, but gave nothing"):
        list(load_ahead(hang, range(2), workers=1, stalled_s=1))


def test_a_signal_ends_the_wait_for_an_item_that_does_not_come():
    with stop_on_signal() as stop:
        items = load_ahead(hang_later, range(2), workers=1)
        next(items)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        began = time.monotonic()
        with pytest.raises(StoppedWaitingError):
            next(items)
    assert time.monotonic() - began < loading.CHECK_S + 2


def test_what_cannot_be_sent_to_workers_is_refused_before_they_start():
    with pytest.raises(WorkersError, match="cannot be sent to worker processes"):
        list(load_ahead(lambda key: key, range(2), workers=1))


def test_workers_that_cannot_start_are_refused(monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter", refuse)
    with pytest.raises(WorkersError, match=r"cannot start: OSError.*No space left"):
        list(load_ahead(make_large, range(2), workers=1))


def test_a_batch_without_room_in_shared_memory_is_refused_with_both_sizes(monkeypatch):
    monkeypatch.setattr(loading, "_free_bytes", lambda: 30 * 2**20)
    refusal = loading._Calls(make_large, shared=True)[0]
    assert isinstance(refusal, WorkersError)
    assert "needs 41.9 MB of /dev/shm" in str(refusal)
    assert "31.5 MB are free" in str(refusal)
    assert "--shm-size" in refusal.hint
    assert set(loading._Calls(make_large, shared=False)[0]) == {"views"}


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs a mount")
@pytest.mark.parametrize(("size", "says"), [("64m", "--shm-size"), ("4k", "cannot start: OSError")])
def test_a_small_dev_shm_is_named_within_seconds(tmp_path, size, says):
    (tmp_path / "program.py").write_text(
        "from test_loading import *\n"
        "if __name__ == '__main__':\n"
        "    try:\n"
        "        list(load_ahead(make_large, range(9), workers=2))\n"
        "    except WorkersError as refusal:\n"
        "        print(refusal)\n"
    )
    command = (
        f"mount -t tmpfs -o size={size} tmpfs /dev/shm || exit 99\n{sys.executable} program.py"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=SLOW_START_S,
        check=False,
    )
    if done.returncode in (1, 99):
        pytest.skip("no private mount here")
    assert says in done.stdout
    assert "Traceback" not in done.stderr
