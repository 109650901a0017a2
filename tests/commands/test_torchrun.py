"""Under torchrun, train divides its work and every command that cannot is refused in one line."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from support.builds import record_toy, write_file
from support.command import kd_cache
from support.pages import blocks
from support.runs import curve, state_of
from support.streams import train_document

from cache_service.errors import ConfigError
from cache_service.processes import launched_rank
from distill.config import load_config
from distill.trainer import train


@pytest.fixture
def launched(monkeypatch):
    """The variables of torchrun."""

    def launch(rank, world):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)

    return launch


@pytest.mark.parametrize(
    "words",
    [
        ("demo",),
        ("distill", "photos", "--teacher", "a", "--student", "b"),
        ("experiment", "FILE"),
        ("cycle", "FILE"),
        ("reproduce", "hinton-mnist"),
        ("bench", "step"),
    ],
    ids=lambda words: words[0],
)
def test_what_would_run_once_on_each_rank_is_refused(launched, words):
    launched("1", "2")
    ended = kd_cache(*words)
    assert ended.code == 2
    assert ended.err.startswith(f"rank 1: error[unsupported]: kd-cache {words[0]} was started by")
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(("rank", "world"), [("0", "1"), ("5", "1"), ("", "1")])
def test_one_process_is_no_rank(launched, rank, world):
    launched(rank, world)
    assert launched_rank() == (0, 1)


@pytest.mark.parametrize(
    ("rank", "world"), [("", "2"), ("2", "2"), ("-1", "2"), ("0", "many"), ("0", "")]
)
def test_variables_that_contradict_each_other_are_refused(launched, rank, world):
    launched(rank, world)
    with pytest.raises(ConfigError, match=f"WORLD_SIZE={world} and RANK={rank} are set"):
        launched_rank()


def test_ranks_are_those_of_the_variables(launched):
    launched("3", "4")
    assert launched_rank() == (3, 4)


TOYS = {"name": "support.toys:patches", "args": {"num_samples": 96}}
COMMANDS = [
    line
    for block in blocks("sh")
    for line in block.text.splitlines()
    if line.startswith("torchrun") and "--nnodes" not in line
]
FILE = "examples/digits.train.yaml"
"""What the commands of the page name; here it trains the toys."""


@pytest.fixture
def folder(tmp_path):
    """A folder with a recorded cache and a train file."""
    record_toy(str(tmp_path / "cache"), dataset=TOYS)
    (tmp_path / "examples").mkdir()
    evaluate = {"dataset": {"name": "support.toys:patches", "args": {"num_samples": 30, "salt": 1}}}
    document = train_document(
        str(tmp_path / "run"),
        dataset=TOYS,
        caches=str(tmp_path / "cache"),
        student={"model": "support.streams:normed_net"},
        batch_size=20,
        evaluate=evaluate,
    )
    write_file(tmp_path / FILE, document)
    return tmp_path


@pytest.fixture
def start(folder):
    """Starts a command of the page in the folder. It ends with the test."""
    with ExitStack() as stack:

        def start(command):
            process = subprocess.Popen(
                shlex.split(command, comments=True),
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                # Commands of an environment that is not activated are on no PATH.
                env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            )
            stack.enter_context(process)
            stack.callback(process.terminate)  # torchrun ends its ranks, too
            return process

        yield start


def test_the_page_has_commands():
    assert len(COMMANDS) == 2


@pytest.mark.parametrize("command", COMMANDS, ids=["command", "module"])
def test_the_commands_of_the_page_train_as_one_process_does(folder, start, command):
    started = start(command)
    out, err = started.communicate()
    assert started.returncode == 0, err
    assert len(out.splitlines()) == 2  # steps and scores, from rank 0 alone
    assert err.count('"kind": "checkpoint"') == 2
    alone = load_config(folder / FILE, [f"out={folder / 'alone'}"])
    train(alone)
    for line, expected in zip(curve(folder / "run"), curve(folder / "alone"), strict=True):
        assert line.pop("kind") == expected.pop("kind")
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-5)
    files = {path.name for path in (folder / "alone").iterdir()}
    assert {path.name for path in (folder / "run").iterdir()} == files


def read_until(started, step):
    """What a run prints, until it reports that step."""
    lines = []
    for line in started.stderr:
        lines.append(line)
        if f'"kind": "step", "epoch": {step // 5}, "step": {step},' in line:
            break
    return "".join(lines)


@pytest.mark.timeout(300)  # six processes that import torch, in turn
def test_ranks_that_torchrun_starts_again_resume_and_ctrl_c_stops_all_of_them(folder, start):
    often = ["epochs=4000", "checkpoint_every.steps=20", "log_every=11"]
    command = COMMANDS[0].partition("#")[0].replace("torchrun", "torchrun --max-restarts 1")
    started = start(f"{command} {' '.join(f'--set {each}' for each in often)}")
    read_until(started, 99)
    ranks = [each for each in psutil.Process(started.pid).children() if "train" in each.cmdline()]
    ranks[-1].kill()
    said = read_until(started, 297)
    # torchrun ends the other rank as soon as it sees the death, which may be before the rank does.
    assert said.count("error[workers]: another process of this run ended") <= 1
    (again,) = [json.loads(line) for line in said.splitlines() if '"kind": "start"' in line]
    assert again["step"] >= 80  # from the last checkpoint
    assert again["step"] % 20 == 0
    started.send_signal(signal.SIGINT)
    _, err = started.communicate()
    assert started.returncode == 1  # torchrun's own, whatever its processes end with
    for rank in (0, 1):
        assert f"rank {rank}: interrupted; the same command resumes" in err
    saved = [json.loads(line)["step"] for line in err.splitlines() if '"checkpoint"' in line][-1]
    assert state_of(folder / "run")["history"]["step"] == saved
    first = []
    with pytest.raises(KeyboardInterrupt):
        train(
            load_config(folder / FILE, [*often, "log_every=1"]),
            on_event=lambda event: note_and_stop(first, event),
        )
    assert first == [saved + 1]


def note_and_stop(steps, event):
    if event.kind == "step":
        steps.append(event.step)
        os.kill(os.getpid(), signal.SIGINT)
