"""The walk of docs/scaling.md in a fresh clone, word by word, on a Ray cluster of two nodes here.

Installing is left out: the environment of the tests is used, and a bucket of this machine.
"""

from __future__ import annotations

import re
import shutil
import sys
import uuid
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from support import s3
from support.builds import tree_bytes
from support.clones import Machine
from support.pages import ROOT, blocks_of
from support.sockets import free_port

from cache_service.rows.reader import open_cache

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore"),  # Ray leaves sockets and processes behind
    pytest.mark.skipif(
        not (shutil.which("git") and (ROOT / ".git").exists()), reason="the walk needs git"
    ),
]


@pytest.fixture
def machine(tmp_path):
    """A clone whose `ray start` processes end with the test."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    made = Machine(tmp_path / "machine")
    mark = uuid.uuid4().hex
    made.env |= {"KD_CACHE_WALK": mark, "RAY_AUTH_MODE": "disabled"}
    made.env |= s3.moto_environment() | {"XDG_CACHE_HOME": str(tmp_path / "copies")}
    # `ray` is a script beside the interpreter.
    made.env["PATH"] += f":{Path(sys.executable).parent}"
    srun = made.folder / "bin" / "srun"
    srun.write_text('#!/bin/sh\nexec "$@"\n')
    srun.chmod(0o755)
    yield made
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("KD_CACHE_WALK") == mark:
                process.kill()


NOT_RUN = {
    "ray:": "tests/docs/test_blocks.py reads it as a part of a build file",
    "caches:": "tests/docs/test_blocks.py reads it as a part of a train file",
    "proxy_cache_path /var/cache/nginx/kd-cache levels=1:2": "tests/api/test_replicas.py runs it",
}
"""Blocks of the page that are no commands, and where they are tested."""


def scripts():
    """The blocks of the page by their first words, without installation."""
    found = {}
    for block in blocks_of(ROOT / "docs" / "scaling.md"):
        lines = [line for line in block.text.splitlines() if not line.startswith("pip install")]
        words = " ".join(lines[0].split()[:3])
        assert words not in found, "two blocks begin alike"
        found[words] = lines
    return found


def test_the_walk_has_no_stumble(machine):
    blocks = scripts()
    for words in NOT_RUN:
        blocks.pop(words)
    machine.clone()
    machine.run("\n".join(blocks.pop("kd-cache train examples/digits.teacher.yaml")))
    cache = machine.folder / "kd-cache" / "caches" / "digits"

    (part,) = blocks.pop("kd-cache build examples/digits.build.yaml")
    for number in range(4):
        machine.run(part.replace("0/4", f"{number}/4"))
    by_parts = take(cache)

    array = blocks.pop("#!/bin/bash")
    tasks = re.search(r"--array=0-(\d+) ", array[1])
    assert tasks is not None
    count = int(tasks[1]) + 1
    for number in range(count):
        task = f"SLURM_ARRAY_TASK_ID={number} SLURM_ARRAY_TASK_COUNT={count}"
        machine.run("\n".join([task, *array]))
    assert take(cache) == by_parts

    head, other, build = blocks.pop("ray start --head")
    address = f"127.0.0.1:{free_port()}"
    node = "--num-cpus=2 --include-dashboard=false --disable-usage-stats"
    machine.run(f"{head.partition('#')[0]} --port={address.rpartition(':')[2]} {node}")
    machine.run(f"{other.partition('#')[0].replace('HEAD:6379', address)} --num-cpus=1")
    machine.run(build.replace("HEAD:6379", address))
    assert take(cache) == by_parts

    machine.env["RAY_ADDRESS"] = address  # other tests start clusters, too
    (data,) = blocks.pop("python examples/ray_data.py examples/digits.build.yaml")
    machine.run(data)
    assert tree_bytes(cache) == by_parts

    student = machine.folder / "kd-cache" / "runs" / "digits-student"
    for command in blocks.pop("torchrun --nproc-per-node 2"):
        machine.run(command)
        assert (student / "student.safetensors").is_file()
        shutil.rmtree(student)

    keys, *bucket = blocks.pop("export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...")
    assert "AWS_ENDPOINT_URL" in keys
    machine.run("\n".join(bucket).replace("s3://bucket", s3.new_prefix()))
    assert (student / "student.safetensors").is_file()
    assert not blocks, "no part of the walk"


def take(cache):
    """The bytes of a complete cache, which is moved away."""
    opened = open_cache(str(cache))
    assert {len(shards) for shards in opened.commits().values()} == {opened.spec.num_shards}
    found = tree_bytes(cache)
    shutil.rmtree(cache)
    return found
