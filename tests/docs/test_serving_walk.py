"""The walk of docs/serving.md in a fresh clone, word by word, on two "machines" of this one.

Installing is left out (the environment of the tests is used), and the files of the clone train for
fewer epochs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from support.fronts import free_port
from support.pages import ROOT, blocks_of

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (shutil.which("git") and shutil.which("curl") and (ROOT / ".git").exists()),
        reason="the walk needs git, curl and a clone",
    ),
]

PRINTED = "http://192.0.2.7:8000"
FEWER = {
    "digits.teacher.yaml": ("epochs: 6", "epochs: 2"),
    "digits.build.yaml": ("seeds: 0:4", "seeds: 0:2"),
    "digits.train.yaml": ("epochs: 8", "epochs: 1"),
    "digits.request.json": ('"0:8"', '"0:2"'),
}


class Machine:
    """A folder with a clone, and a shell that keeps its variables from block to block."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.exports = folder, ""
        programs = folder / "bin"
        programs.mkdir()
        for name, start in (("kd-cache", ' -c "from cli.main import run; run()"'), ("python", "")):
            command = programs / name
            command.write_text(f'#!/bin/sh\nexec {sys.executable}{start} "$@"\n')
            command.chmod(0o755)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("KD_CACHE")}
        path = f"{programs}:{os.environ['PATH']}"
        self.env = {**clean, "PATH": path, "PYTHONPATH": str(folder / "kd-cache")}

    def clone(self, block):
        """Do the first two lines of a block, and return the others but for the installation."""
        first, venv, install, *rest = block.splitlines()
        assert first == "git clone REPOSITORY kd-cache && cd kd-cache"
        assert venv.startswith("python3 -m venv .venv && . ")
        assert install.startswith("pip install -c constraints.txt -e ")
        subprocess.run(["git", "clone", "-q", str(ROOT), "kd-cache"], cwd=self.folder, check=True)
        for name, (before, after) in FEWER.items():
            file = self.folder / "kd-cache" / "examples" / name
            text = file.read_text()
            assert text.count(before) == 1, name
            file.write_text(text.replace(before, after))
        return "\n".join(rest)

    def run(self, script):
        done = subprocess.run(
            ["bash", "-euc", self.exports + script],
            cwd=self.folder / "kd-cache",
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        self.exports += "".join(re.findall(r"^export .*\n", script, re.MULTILINE))
        return done.stdout, done.stderr

    def start(self, command):
        return subprocess.Popen(
            ["bash", "-euc", f"exec {command}"],
            cwd=self.folder / "kd-cache",
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )


def test_the_walk_has_no_stumble(tmp_path):
    shell = [b.text for b in blocks_of(ROOT / "docs" / "serving.md") if b.language == "sh"]
    train_teacher, token, serve, student, clients, request, _prometheus = shell
    teacher = Machine(tmp_path / "teacher")
    teacher.run(teacher.clone(train_teacher))
    (secret,) = re.findall(r"kdc_\S+", teacher.run(token)[0])
    service = teacher.start(f"{serve.strip()} --port {free_port()}")
    try:
        said = service.stdout.readline()
        address = re.fullmatch(r"serving caches at (http://\S+)\n", said)[1]

        def as_printed(script):
            return script.replace(PRINTED, address).replace("kdc_...", secret)

        there = Machine(tmp_path / "student")
        shown, _ = there.run(as_printed(there.clone(student)))
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
