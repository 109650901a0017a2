"""Under torchrun, train divides its work and every command that cannot is refused in one line."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess

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


def start(command, folder):
    return subprocess.Popen(
        shlex.split(command, comments=True),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_page_has_commands():
    assert len(COMMANDS) == 2


@pytest.mark.parametrize("command", COMMANDS, ids=["command", "module"])
def test_the_commands_of_the_page_train_as_one_process_does(folder, command):
    started = start(command, folder)
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


def test_ctrl_c_leaves_one_checkpoint_and_the_same_command_resumes(folder):
    command = f"{COMMANDS[0].partition('#')[0]} --set epochs=400 --set checkpoint_every.epochs=1000"
    started = start(command, folder)
    for line in started.stderr:
        if '"step": 100,' in line:
            break
    started.send_signal(signal.SIGINT)
    _, err = started.communicate()
    assert started.returncode == 1  # torchrun's own, whatever its processes end with
    for rank in (0, 1):
        assert f"rank {rank}: interrupted; the same command resumes" in err
    assert err.count('"kind": "checkpoint"') == 1
    saved = state_of(folder / "run")["history"]["step"]
    assert 100 <= saved < 2000
    config = load_config(folder / FILE, ["epochs=400", "checkpoint_every.epochs=1000"])
    steps = []
    with pytest.raises(KeyboardInterrupt):
        train(config, on_event=lambda event: note_and_stop(steps, event))
    assert steps == [saved + 1]


def note_and_stop(steps, event):
    if event.kind == "step":
        steps.append(event.step)
        os.kill(os.getpid(), signal.SIGINT)
