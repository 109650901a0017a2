"""Students in processes of their own, and the command from outside.

Both tests with processes take as long as these take to import torch, 3 to 6 seconds: nothing short
of a process shows that a refusal, a measurement and Ctrl-C get out of one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from typer.testing import CliRunner

from cache_service.errors import ConfigError, NotACacheError
from cli.experiments.demo.run import loss_curve
from cli.experiments.measure import STOP_S, MeasuringProcesses, VariantJob
from cli.main import app
from distill.config import TrainConfig


def job_of(demo, *, out, cache=None):
    job = demo.jobs[2]
    changes = {"out": str(out), "epochs": 1, "schedule": {"name": "constant"}}
    if cache is not None:
        changes["caches"] = str(cache)
    settings = job.train.model_dump(mode="json") | changes
    return VariantJob(train=TrainConfig.model_validate(settings))


def test_a_child_measures_or_refuses_as_this_process_would(demo, tmp_path):
    told = []
    with MeasuringProcesses(2, threads=1) as children:
        with pytest.raises(NotACacheError, match=r"no cache at .*nowhere"):
            children.measure(job_of(demo, out=tmp_path / "a", cache=tmp_path / "nowhere"), print)
        found = children.measure(job_of(demo, out=tmp_path / "b"), lambda *news: told.append(news))
    assert told == [(1, found.accuracy)]
    assert found.seconds_per_step > 0
    assert found.peak_memory_bytes > 0
    assert found.device == "cpu"
    assert len(loss_curve(str(tmp_path / "b"))) == 12


def test_ctrl_c_ends_the_demo_and_its_children_with_130(tmp_path):
    demo = subprocess.Popen(
        [sys.executable, "-c", "from cli.main import run; run()", "demo", "--out", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    with demo:
        for line in demo.stderr:
            if line.startswith("1 of 4"):
                break
        children = psutil.Process(demo.pid).children()
        os.killpg(demo.pid, signal.SIGINT)
        told_at = time.monotonic()
        said = demo.stderr.read()
        assert demo.wait(60) == 130, said
        assert time.monotonic() - told_at < STOP_S  # the children went when told, not when killed
    assert "Traceback" not in said
    assert said.strip().endswith("interrupted; the same command resumes")
    assert len(children) == 4
    assert not any(child.is_running() for child in children)


def test_without_scikit_learn_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    refused = CliRunner().invoke(app, ["demo", "--out", "unused"]).exception
    assert isinstance(refused, ConfigError)
    assert refused.exit_code == 2
    assert "\n" not in str(refused)
    assert "needs sklearn" in str(refused)
    assert "pip install 'kd-cache[demo]'" in str(refused)
