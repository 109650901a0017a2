"""One small recording by every engine is one set of bytes, and its students have one curve."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import s3
from support.builds import build_document, record_toy, tree_bytes, write_file
from support.clusters import finish, kill_between_commits, running_head, start
from support.ranks import run_ranks
from support.runs import curve, same, state_of
from support.streams import train_config

from cache_service.storage import open_storage
from distill.trainer import train

pytestmark = [
    pytest.mark.faults,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore"),  # Ray leaves sockets and processes behind
]

TOYS = {"name": "support.slow:slow_patches", "args": {"num_samples": 320}}
BUILD = {"dataset": TOYS, "seeds": "0:2", "augment": {"preset": "cifar", "size": 16}}
ENGINES = ("local", "ray-1", "ray-2", "shards", "bucket")


def digest(objects):
    """One digest of all keys and bytes."""
    found = hashlib.sha256()
    for key, body in sorted(objects.items()):
        found.update(f"{key} {len(body)} ".encode())
        found.update(body)
    return found.hexdigest()


def by_ray(folder, cluster, processes):
    """Record on Ray; an actor is killed after each of the first commits."""
    folder.mkdir()
    running = start(folder, cluster, processes=processes, **BUILD)
    kill_between_commits(cluster, folder, processes + 1)
    out, err, code = finish(running, 200)
    assert code == 0, err
    result = json.loads(out)
    assert result["deaths"] >= 1
    assert result["shards_committed"] == len(list((folder / "cache/commits").rglob("[0-9]*.json")))


def by_shards(folder):
    """Record by two commands at once, each with its part."""
    folder.mkdir()
    write_file(folder / "build.yaml", build_document("cache", **BUILD))
    code = "from cli.main import run; run()"
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", code, "build", "build.yaml", "--shard", f"{part}/2"],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for part in (0, 1)
    ]
    for builder in builders:
        _, err = builder.communicate(timeout=200)
        assert builder.returncode == 0, err


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """URL and objects of the recording of each engine."""
    root = tmp_path_factory.mktemp("engines")
    record_toy(str(root / "local" / "cache"), **BUILD)
    with running_head(tmp_path_factory.mktemp("head")) as cluster:
        for processes in (1, 2):
            by_ray(root / f"ray-{processes}", cluster, processes)
    by_shards(root / "shards")
    urls = {name: str(root / name / "cache") for name in ENGINES[:-1]}
    found = {name: (url, tree_bytes(Path(url))) for name, url in urls.items()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3.moto_environment().items():
            patch.setenv(name, value)
        url = s3.new_prefix()
        record_toy(url, **BUILD)
        storage = open_storage(url)
        found["bucket"] = url, {key: storage.get(key) for key in storage.list("")}
        yield found


def trained(out, url, environment):
    """Train a student with batch norms from a recording."""
    os.environ |= environment  # other ranks' processes have that of the first test
    config = train_config(
        Path(out),
        dataset=TOYS,
        caches=url,
        student__model="support.streams:normed_net",
        batch_size=20,
        workers=0,
        loader="workers",
    )
    train(config)


@pytest.fixture(scope="module")
def alone(recorded, tmp_path_factory):
    """Folder of the student that one process trained from the local engine's recording."""
    out = tmp_path_factory.mktemp("alone")
    trained(out, recorded["local"][0], {})
    assert len(curve(out)) > 2
    return out


def test_every_engine_records_one_digest_though_its_processes_are_killed(recorded):
    assert tuple(recorded) == ENGINES
    assert len({digest(objects) for _, objects in recorded.values()}) == 1
    assert len(recorded["local"][1]) > 40


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_students_of_every_recording_have_one_curve(recorded, alone, tmp_path, engine):
    trained(tmp_path, recorded[engine][0], {})
    assert curve(tmp_path) == curve(alone)
    same(state_of(tmp_path), state_of(alone))


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_students_of_several_processes_have_that_curve_up_to_the_order_of_sums(
    recorded, alone, tmp_path, engine, world
):
    reach = s3.moto_environment()
    assert run_ranks(world, trained, tmp_path, recorded[engine][0], reach) == [None] * world
    lines, expected = curve(tmp_path), curve(alone)
    assert [line.keys() for line in lines] == [line.keys() for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-5, abs=1e-5)
