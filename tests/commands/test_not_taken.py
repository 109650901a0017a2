"""plan, build and train name the files of a folder that they do not take."""

from __future__ import annotations

import PIL.Image
import pytest
from support.builds import build_document, write_file
from support.command import kd_cache


@pytest.fixture
def root(tmp_path):
    for split in ("train", "val"):
        for name, color in (("a", (200, 0, 0)), ("b", (0, 200, 0))):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(4):
                path = tmp_path / "images" / split / name / f"{number}.png"
                PIL.Image.new("RGB", (16, 16), color).save(path)
    (tmp_path / "images" / "train" / "a" / "4.gif").write_bytes(b"")
    (tmp_path / "images" / "val" / "loose.png").write_bytes(b"")
    return tmp_path


def test_the_commands_count_and_name_what_they_leave_out(root):
    dataset = {"name": "folder", "root": str(root / "images")}
    build = build_document(str(root / "c"), dataset=dataset, seeds="0:1", scales=[1])
    file = str(write_file(root / "b.yaml", build))
    told = f"1 .gif, such as {root}/images/train/a/4.gif"
    planned = kd_cache("plan", file)
    assert planned.code == 0
    assert "dataset      folder (train): 8 samples of 2 classes\n" in planned.out
    assert f"not taken    {told}\n" in planned.out
    assert f"not taken: {told}" in kd_cache("build", file).err
    train = {
        "dataset": dataset,
        "caches": str(root / "c"),
        "student": {"model": "support.toys:tiny_net"},
        "method": {"name": "kd"},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "epochs": 1,
        "batch_size": 4,
        "workers": 0,
        "device": "cpu",
        "out": str(root / "out"),
        "evaluate": {"dataset": dataset | {"split": "val"}},
    }
    trained = kd_cache("train", str(write_file(root / "t.yaml", train)))
    assert trained.code == 0, trained.err
    assert f"{told}; 1 image beside the class folders, such as {root}/images/val" in trained.err
