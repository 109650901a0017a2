"""Walks through a page in a fresh clone: its shell blocks, as printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from support.pages import ROOT

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

    def clone(self):
        """Clone this repository, with files that train for fewer epochs."""
        subprocess.run(["git", "clone", "-q", str(ROOT), "kd-cache"], cwd=self.folder, check=True)
        for name, (before, after) in FEWER.items():
            file = self.folder / "kd-cache" / "examples" / name
            text = file.read_text()
            assert text.count(before) == 1, name
            file.write_text(text.replace(before, after))

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
