"""The walk of docs/serving.md in a fresh clone, word by word, on two "machines" of this one.

Installing is left out (the environment of the tests is used), and the files of the clone train for
fewer epochs.
"""

from __future__ import annotations

import re
import shutil
import signal

import pytest
from support.clones import Machine
from support.pages import ROOT, blocks_of
from support.sockets import free_port

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (shutil.which("git") and shutil.which("curl") and (ROOT / ".git").exists()),
        reason="the walk needs git, curl and a clone",
    ),
]

PRINTED = "http://192.0.2.7:8000"


def cloned(machine, block):
    """Do the first lines of a block, and return the others but for the installation."""
    first, venv, install, *rest = block.splitlines()
    assert first == "git clone REPOSITORY kd-cache && cd kd-cache"
    assert venv.startswith("python3 -m venv .venv && . ")
    assert install.startswith("pip install -c constraints.txt -e ")
    machine.clone()
    return "\n".join(rest)


def test_the_walk_has_no_stumble(tmp_path):
    shell = [b.text for b in blocks_of(ROOT / "docs" / "serving.md") if b.language == "sh"]
    train_teacher, token, serve, student, clients, request, _prometheus = shell
    teacher = Machine(tmp_path / "teacher")
    teacher.run(cloned(teacher, train_teacher))
    (secret,) = re.findall(r"kdc_\S+", teacher.run(token)[0])
    service = teacher.start(f"{serve.strip()} --port {free_port()}")
    try:
        said = service.stdout.readline()
        address = re.fullmatch(r"serving caches at (http://\S+)\n", said)[1]

        def as_printed(script):
            return script.replace(PRINTED, address).replace("kdc_...", secret)

        there = Machine(tmp_path / "student")
        shown, _ = there.run(as_printed(cloned(there, student)))
        assert "digits" in shown
        assert (there.folder / "kd-cache/runs/digits-student/student.safetensors").is_file()
        read, _ = there.run(as_printed(clients))
        assert read.count("class ") >= 8
        there.run(as_printed(request))
        assert (there.folder / "kd-cache/runs/more/student.safetensors").is_file()
    finally:
        service.send_signal(signal.SIGTERM)
        assert service.wait(20) == 0
        service.stdout.close()
