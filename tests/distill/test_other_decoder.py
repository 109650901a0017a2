"""The same files under another JPEG decoder are told from another dataset, and may be let through.

The other decoder is libjpeg-turbo with its fast, inexact transform, which simplejpeg offers.
"""

from __future__ import annotations

import re
import shutil

import numpy as np
import PIL.Image
import pytest
import simplejpeg
from support.builds import open_toy, run_build, tree_bytes, write_file
from support.command import kd_cache

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.datasets.folder import FolderSource
from cache_service.errors import SpecMismatchError, ViewDriftError
from cache_service.recording.engines import prepare
from distill import CachedDataset, load_cache

NUM_IMAGES = 72
"""More than the 64 whose pixels are in the identity."""


def smooth(number):
    y, x = np.mgrid[:20, :20]
    waves = [128 + 90 * np.sin((x * a + y * b + number) / 5) for a, b in ((1, 2), (2, 1), (1, 1))]
    return PIL.Image.fromarray(np.stack(waves, -1).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("jpegs")
    for number in range(NUM_IMAGES):
        path = root / "abc"[number % 3] / f"{number:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        smooth(number).save(path, quality=80)
    return root


def changes(root):
    return {"dataset": {"name": "folder", "root": str(root)}, "scales": [1], "seeds": "0:1"}


@pytest.fixture(scope="module")
def recorded(folder, tmp_path_factory):
    return run_build(open_toy(str(tmp_path_factory.mktemp("cache") / "c"), **changes(folder))).url


def decode_fast(source, sample):
    content = source.encoded(sample)
    return PIL.Image.fromarray(simplejpeg.decode_jpeg(content, "RGB", fastdct=True))


@pytest.fixture
def other_decoder(monkeypatch):
    monkeypatch.setattr(FolderSource, "read", decode_fast)


def opened(root):
    return open_dataset(DatasetConfig(name="folder", root=str(root)))


def read_all(url, root, **settings):
    data = CachedDataset(load_cache(url), images=opened(root), seed=0, **settings)
    return data.__getitems__(list(range(NUM_IMAGES)))


def test_the_two_decoders_differ_by_rounding_only(folder, monkeypatch):
    exact = [np.asarray(opened(folder).image(n)).astype(int) for n in range(NUM_IMAGES)]
    monkeypatch.setattr(FolderSource, "read", decode_fast)
    fast = [np.asarray(opened(folder).image(n)).astype(int) for n in range(NUM_IMAGES)]
    assert 1 <= max(np.abs(a - b).max() for a, b in zip(exact, fast, strict=True)) <= 8


def test_another_decoder_is_named_with_its_difference_and_the_way_out(
    recorded, folder, other_decoder
):
    with pytest.raises(ViewDriftError, match=r"files of dataset .* are those .* dec") as refusal:
        read_all(recorded, folder)
    assert re.search(r"rounding \(at most \d levels? in .* % of pixels\)", refusal.value.message)
    assert re.search(r"replay: \{max_drift: \d\}", refusal.value.hint)
    assert "\n" not in str(refusal.value)


def test_max_drift_lets_another_decoder_through_up_to_its_bound(recorded, folder, other_decoder):
    assert len(read_all(recorded, folder, max_drift=8)) == NUM_IMAGES
    with pytest.raises(ViewDriftError, match="its file is the recorded one, but is decoded to oth"):
        read_all(recorded, folder, max_drift=1)


@pytest.mark.parametrize("change", ["label", "name", "content"])
def test_another_dataset_is_not_let_through_as_another_decoder(
    recorded, folder, other_decoder, tmp_path, change
):
    shutil.copytree(folder, tmp_path / "other")
    first = tmp_path / "other" / "a" / "00.jpg"
    if change == "label":
        first.rename(tmp_path / "other" / "b" / "00.jpg")
    elif change == "name":
        first.rename(first.with_name("000.jpg"))
    else:
        smooth(99).save(first, quality=80)
    with pytest.raises(SpecMismatchError, match="class order or paths differ") as refusal:
        read_all(recorded, tmp_path / "other", max_drift=255)
    assert "decoder" not in str(refusal.value)


def test_an_image_outside_of_the_identity_is_still_compared_by_the_witnesses(
    recorded, folder, other_decoder, tmp_path
):
    shutil.copytree(folder, tmp_path / "other")
    dataset = opened(folder)
    cache = load_cache(recorded)
    witnesses = cache.read(0, 0, NUM_IMAGES)["sample"][cache.layout.witness_positions(0)]
    sample = next(int(n) for n in witnesses if int(n) not in dataset._probes)
    path = dataset.describe(sample).replace(str(folder), str(tmp_path / "other"))
    PIL.Image.new("RGB", (20, 20)).save(path)
    with pytest.raises(ViewDriftError, match="another crop or other pixels, not rounding"):
        read_all(recorded, tmp_path / "other", max_drift=8)


def without_checksum(url, path):
    """A copy of the cache as an earlier version wrote it."""
    from support.recorded_as import rewrite_provenance

    return rewrite_provenance(url, path, lambda facts: facts.pop("files_sha256"))


def test_an_older_cache_says_what_is_likely_and_lets_nothing_through(
    recorded, folder, other_decoder, tmp_path
):
    url = without_checksum(recorded, tmp_path / "old")
    with pytest.raises(SpecMismatchError, match=r"probably the same dataset under .* rounding"):
        read_all(url, folder, max_drift=8)
    shutil.copytree(folder, tmp_path / "other")
    for path in (tmp_path / "other").rglob("*.jpg"):
        PIL.Image.new("RGB", (20, 20), (5, 200, 5)).save(path)
    with pytest.raises(SpecMismatchError) as refusal:
        read_all(url, tmp_path / "other", max_drift=8)
    assert "probably" not in str(refusal.value)


def test_an_older_cache_of_the_same_pixels_reads_as_before(recorded, folder, tmp_path):
    url = without_checksum(recorded, tmp_path / "old")
    assert len(read_all(url, folder)) == NUM_IMAGES


def test_another_decoder_neither_continues_nor_verifies_a_recording(
    recorded, folder, other_decoder, tmp_path
):
    shutil.copytree(recorded, tmp_path / "c")
    before = tree_bytes(tmp_path / "c")
    with pytest.raises(ViewDriftError, match="decoded to other pixels here: rounding") as refusal:
        prepare(open_toy(str(tmp_path / "c"), **changes(folder) | {"seeds": "0:2"}))
    assert "max_drift" not in str(refusal.value)
    assert tree_bytes(tmp_path / "c") == before
    ended = kd_cache("verify", str(tmp_path / "c"), "--recompute", "4")
    assert ended.code == 3
    assert "decoded to other pixels here: rounding" in ended.err


def test_training_reaches_the_setting(recorded, folder, other_decoder, tmp_path):
    train = {
        "dataset": {"name": "folder", "root": str(folder)},
        "caches": recorded,
        "student": {"model": "support.toys:tiny_net"},
        "method": {"name": "kd"},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "epochs": 1,
        "batch_size": 24,
        "workers": 0,
        "device": "cpu",
        "out": str(tmp_path / "out"),
    }
    file = str(write_file(tmp_path / "t.yaml", train))
    for loader in ("device", "workers"):
        ended = kd_cache("train", file, "--set", f"loader={loader}")
        assert (ended.code, "error[view_drift]" in ended.err) == (3, True)
        changed = ("--set", f"loader={loader}", "--set", "replay.max_drift=8")
        ended = kd_cache("train", file, *changed, "--set", f"out={tmp_path / loader}")
        assert ended.code == 0, ended.err
