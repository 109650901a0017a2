"""After images or a checkpoint were moved, verify and build are told where they are."""

from __future__ import annotations

import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from support.builds import build_document, run_build, tree_bytes, write_file
from support.command import kd_cache
from support.toys import tiny_net

from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.rows.reader import open_cache


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A cache of a folder and a checkpoint that are named by relative paths."""
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        path = tmp_path / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (18, 18, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(path)
    torch.save(tiny_net(2).state_dict(), tmp_path / "net.pt")
    document = build_document(
        "cache",
        dataset={"name": "folder", "root": "images"},
        scales=[1],
        seeds="0:1",
        teacher__checkpoint="net.pt",
    )
    write_file(tmp_path / "b.yaml", document)
    run_build(open_build(BuildConfig.model_validate(document)))
    return tmp_path


def test_verify_says_what_was_not_found_and_takes_its_new_place(here):
    (here / "images").rename(here / "pictures")
    ended = kd_cache("verify", "cache", "--recompute", "4")
    assert ended.code == 2
    assert "no folder at" in ended.err
    assert "name its new place: --set dataset.root=..." in ended.err
    ended = kd_cache("verify", "cache", "--recompute", "4", "--set", "dataset.root=pictures")
    assert (ended.code, ended.err) == (0, "")
    assert "4 replay exactly" in ended.out


def test_verify_takes_a_moved_checkpoint_and_expands_its_path(here, monkeypatch):
    (here / "nets").mkdir()
    (here / "net.pt").rename(here / "nets" / "net.pt")
    assert kd_cache("verify", "cache", "--recompute", "4").code == 2
    monkeypatch.setenv("NETS", str(here / "nets"))
    changed = ("--recompute", "4", "--set", "teacher.checkpoint=$NETS/net.pt")
    assert kd_cache("verify", "cache", *changed).code == 0


def test_another_dataset_in_the_new_place_is_refused(here):
    shutil.copytree(here / "images", here / "other")
    (here / "other" / "a" / "0.png").unlink()
    ended = kd_cache("verify", "cache", "--recompute", "4", "--set", "dataset.root=other")
    assert ended.code == 3
    assert "the dataset that opens now is not the one" in ended.err
    torch.save(tiny_net(2, scale=3.0).state_dict(), here / "other.pt")
    ended = kd_cache("verify", "cache", "--recompute", "4", "--set", "teacher.checkpoint=other.pt")
    assert ended.code == 3
    assert "the teacher that opens now is not the one" in ended.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--set", "dataset.root=x"), "without it, neither is opened. Add --recompute 64"),
        (("--recompute", "4", "--set", "scales=[1]"), "by its dataset and its teacher only"),
        (("--recompute", "4", "--set", "dataset.rot=x"), "did you mean root?"),
        (("--recompute", "4", "--set", "dataset"), "not of the form a.b=value"),
        (("--recompute", "4", "--set", "dataset.root=$NOWHERE/x"), "'NOWHERE' in '$NOWHERE/x'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(here, arguments, says):
    ended = kd_cache("verify", "cache", *arguments)
    assert ended.code == 2
    assert says in ended.err
    assert ended.err.count("\n") == 1


def test_building_on_from_the_new_place_teaches_the_cache(here):
    (here / "images").rename(here / "pictures")
    changed = ("--set", "dataset.root=pictures", "--set", "seeds=0:2")
    assert kd_cache("build", "b.yaml", *changed).code == 0
    cache = open_cache("cache")
    assert cache.group.provenance["dataset"]["root"] == "pictures"
    assert cache.complete_seeds() == [0, 1]
    assert kd_cache("verify", "cache", "--recompute", "8").code == 0


def test_the_same_build_again_writes_nothing(here):
    before = tree_bytes(here / "cache")
    root = (here / "cache" / "zarr.json").stat().st_mtime_ns
    assert kd_cache("build", "b.yaml").code == 0
    assert tree_bytes(here / "cache") == before
    assert (here / "cache" / "zarr.json").stat().st_mtime_ns == root


def test_a_refused_build_from_another_place_teaches_nothing(here):
    before = tree_bytes(here / "cache")
    shutil.copytree(here / "images", here / "other")
    (here / "other" / "a" / "0.png").unlink()
    assert kd_cache("build", "b.yaml", "--set", "dataset.root=other").code == 3
    assert tree_bytes(here / "cache") == before
