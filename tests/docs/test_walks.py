"""The walks of docs/architecture.md name the files that really run, in the order of first use."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from typing import Self

import pytest
import torch
from support.asgi import ask_async
from support.builds import open_toy, record_toy, run_build
from support.pages import ROOT

from cache_service.api.app import create_app
from cache_service.api.http.settings import ServeConfig
from cache_service.storage.local import LocalStorage
from distill.config import TrainConfig
from distill.trainer import train

PACKAGES = ("cache_service", "distill", "cli")


class FileTrace:
    """Records the project's files in which functions are called, in parts that `cut` ends."""

    def __init__(self) -> None:
        self.parts: list[list[str]] = []
        self._files: dict[str, None] = {}

    def cut(self) -> None:
        self.parts.append(list(self._files))
        self._files.clear()

    def __enter__(self) -> Self:
        sys.setprofile(self._note)
        threading.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame, event, _argument) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(f"{ROOT}/"):
            relative = file.removeprefix(f"{ROOT}/")
            if relative.split("/")[0] in PACKAGES:
                self._files.setdefault(relative)


def walk(title: str) -> list[str]:
    """The files that one section of the page lists."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = re.search(rf"^### {title}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"^\d+\. `([^`]+)`", section, re.MULTILINE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("walks") / "root" / "c")
    record_toy(path, seeds="0:1", layout={"shard_rows": 96, "chunk_rows": 8})
    return path


def test_one_batch_visits_the_files_of_its_walk(cache, tmp_path, monkeypatch):
    document = {
        "dataset": {"name": "support.toys:patches", "args": {"num_samples": 96}},
        "caches": cache,
        "student": {"model": "resnet20"},
        "method": {"name": "kd"},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "epochs": 1,
        "batch_size": 16,
        "workers": 0,
        "loader": "workers",
        "device": "cpu",
        "out": str(tmp_path / "run"),
    }
    trace = FileTrace()
    update = torch.optim.SGD.step

    def step(*arguments, **options):
        result = update(*arguments, **options)
        trace.cut()
        return result

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    with trace:
        train(TrainConfig.model_validate(document))
    assert trace.parts[3] == trace.parts[4], "a steady step visits the same files each time"
    assert trace.parts[3] == walk("One batch of a training run")


def test_one_recorded_shard_visits_the_files_of_its_walk(tmp_path, monkeypatch):
    build = open_toy(str(tmp_path / "c"), seeds="0:1")
    trace = FileTrace()
    create = LocalStorage.create

    def create_and_cut(self, key, content):
        result = create(self, key, content)
        if key.startswith("commits/"):
            trace.cut()
        return result

    monkeypatch.setattr(LocalStorage, "create", create_and_cut)
    with trace:
        run_build(build)
    # A thread writes one shard while the next one is answered, so the order varies.
    assert set(trace.parts[1]) == set(walk("One recorded shard"))


def test_one_range_request_visits_the_files_of_its_walk(cache):
    app = create_app(ServeConfig(root=str(cache).removesuffix("/c")))
    path, query = "/v1/caches/c/rows", "seed=0&start=8&stop=24"

    async def ask_three_times() -> list[list[str]]:
        trace = FileTrace()
        for _ in range(3):
            with trace:
                answer = await ask_async(app, "GET", path, query, {"host": "127.0.0.1"}, b"")
            trace.cut()
            assert answer.status == 200
        return trace.parts

    assert asyncio.run(ask_three_times())[-1] == walk("One request for a range of rows")
