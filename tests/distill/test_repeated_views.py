"""Training on recordings with several views of an image per seed: `augment.repeats`."""

from __future__ import annotations

import os
import signal
from collections import Counter

import numpy as np
import pytest
import torch
from support.builds import open_toy, record_toy, run_build, tree_bytes
from support.origin import serving
from support.streams import train_config
from support.toys import Patches

from cache_service.errors import SpecMismatchError, UnsupportedError
from distill import CachedDataset, load_cache
from distill.reporting import read_metrics
from distill.stream import open_stream
from distill.trainer import train

CPU = torch.device("cpu")
TOYS = {"name": "support.toys:patches", "args": {"num_samples": 90}}
CROPS = {"preset": "cifar", "size": 16, "repeats": 4}
MIXED = {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}, {"op": "cutmix"}], "repeats": 4}


def record(path, **changes):
    """90 samples are not divisible by 4: the parts of four seeds are cut within samples."""
    return record_toy(str(path), **({"dataset": TOYS, "augment": CROPS, "seeds": "0:4"} | changes))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repeated")
    record(folder / "crops")
    record(folder / "mixed", augment=MIXED)
    return folder


def config_for(out, cache, **changes):
    settings = {
        "dataset": TOYS,
        "caches": cache,
        "student": {"model": "support.streams:normed_net"},
        "method": {"name": "sd-kd"},
        "batch_size": 20,
        "epochs": 6,
    }
    return train_config(out, **(settings | changes))


def losses(out):
    return [line["loss"] for line in read_metrics(str(out)) if line["kind"] == "step"]


def stream_of(cache, **changes):
    config = config_for("unused", cache, **changes)
    return open_stream(config, device=CPU, methods=[config.method])


def test_k_epochs_visit_every_image_k_times_and_a_seed_a_k_th_of_them(root):
    by_epoch = {}
    for batch in stream_of(str(root / "crops"), epochs=4).batches(0):
        by_epoch.setdefault(batch.cursor.epoch, Counter()).update(batch.samples_B.tolist())
    assert all(len(visited) in (23, 24) for visited in by_epoch.values())
    total = sum(by_epoch.values(), Counter())
    assert len(total) == 90
    assert set(total.values()) == {4}


@pytest.mark.parametrize("name", ["crops", "mixed"])
def test_rows_and_views_are_the_same_with_workers_and_from_the_middle(root, name):
    whole = list(stream_of(str(root / name), workers=0, loader="workers").batches(0))
    for first, workers in ((0, 2), (7, 0), (23, 2)):
        again = list(stream_of(str(root / name), workers=workers, loader="workers").batches(first))
        assert len(again) == len(whole) - first
        for one, other in zip(again, whole[first:], strict=True):
            assert torch.equal(one.images_BHW3, other.images_BHW3)
            assert torch.equal(one.samples_B, other.samples_B)
            assert torch.equal(one.weights_B, other.weights_B)
            assert torch.equal(one.rows[0]["logits"], other.rows[0]["logits"])


def test_views_cut_on_the_device_are_those_of_the_workers(root):
    on_device = stream_of(str(root / "crops"), loader="device")
    rendered = stream_of(str(root / "crops"), loader="workers", workers=0)
    for one, other in zip(on_device.batches(0), rendered.batches(0), strict=True):
        assert torch.equal(one.images_BHW3, other.images_BHW3)
        assert torch.equal(one.rows[0]["logits"], other.rows[0]["logits"])


@pytest.mark.parametrize("stop_at", [3, 14, 27])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, root, stop_at):
    train(config_for(tmp_path / "whole", str(root / "crops")))

    def stop(event):
        if event.kind == "step" and event.step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config_for(tmp_path / "parts", str(root / "crops")), on_event=stop)
    train(config_for(tmp_path / "parts", str(root / "crops")))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_over_http_all_passes_have_the_rows_of_the_folder(root, monkeypatch):
    monkeypatch.delenv("KD_CACHE_TOKEN", raising=False)
    here = list(stream_of(str(root / "mixed"), workers=0, epochs=9).batches(0))
    with serving(root) as server:
        there = list(stream_of(server.url("mixed"), workers=0, epochs=9).batches(0))
    for one, other in zip(there, here, strict=True):
        assert torch.equal(one.samples_B, other.samples_B)
        assert torch.equal(one.images_BHW3, other.images_BHW3)
        assert torch.equal(one.rows[0]["logits"], other.rows[0]["logits"])


def test_a_recording_is_the_same_with_workers_in_parts_and_resumed(tmp_path, root):
    settings = {"dataset": TOYS, "augment": MIXED, "seeds": "0:4"}
    run_build(open_toy(str(tmp_path / "c"), **settings, workers=2), seeds=(2,))
    run_build(open_toy(str(tmp_path / "c"), **settings, workers=0), seeds=(0, 1, 2, 3))
    assert tree_bytes(tmp_path / "c").keys() == tree_bytes(root / "mixed").keys()
    assert tree_bytes(tmp_path / "c") == tree_bytes(root / "mixed")


def test_a_cache_of_other_repeats_is_another_cache(tmp_path, root):
    plain = record(tmp_path / "plain", augment={"preset": "cifar", "size": 16})
    assert plain.fingerprint != load_cache(str(root / "crops")).fingerprint
    with pytest.raises(SpecMismatchError, match="recipe"):
        train(
            config_for(tmp_path / "out", [str(root / "crops"), plain.url], method={"name": "soft"})
        )
    with pytest.raises(SpecMismatchError, match="repeats"):
        record(root / "crops", augment={**CROPS, "repeats": 2})


def test_rows_by_sample_are_refused_with_the_reason(root):
    cache = load_cache(str(root / "crops"))
    with pytest.raises(UnsupportedError, match=r"augment.repeats=4: a seed has several rows"):
        cache.lookup(0, np.array([3]))
    with (
        serving(root) as server,
        pytest.raises(UnsupportedError, match=r"several rows of one sample"),
    ):
        load_cache(server.url("crops")).lookup(0, np.array([3]))
    with pytest.raises(UnsupportedError, match=r"several rows of one sample"):
        load_cache(str(root / "crops"), wait_s=1).lookup(0, np.array([3]))


def test_scattered_positions_have_the_rows_of_a_range(root):
    positions = np.array([88, 3, 3, 41, 0])
    here = load_cache(str(root / "crops"))
    wanted = here.read(1, 0, 90)
    with serving(root) as server:
        for cache in (here, load_cache(server.url("crops"))):
            found = cache.gather(1, positions)
            assert found.keys() == wanted.keys()
            for name, rows in wanted.items():
                assert found[name].dtype == rows.dtype
                assert found[name].tobytes() == rows[positions].tobytes()


def test_a_loop_of_ones_own_gets_views_and_logits_by_position(root):
    cache = load_cache(str(root / "crops"))
    data = CachedDataset(cache, Patches(num_samples=90), seed=2)
    batch = data.__getitems__([0, 40, 89])
    rows = cache.read(2, 0, 90)
    assert [label for _, label, _ in batch] == [int(rows["sample"][p]) % 5 for p in (0, 40, 89)]


def test_the_second_view_of_a_sample_is_its_next_one_in_the_same_seed(root):
    for batch in stream_of(str(root / "crops"), method={"name": "ddgsd"}).batches(0):
        (second,) = batch.other_views.values()
        assert torch.equal(second.samples_B, batch.samples_B)
        assert second.cursor == batch.cursor
        same = (second.images_BHW3 == batch.images_BHW3).all(dim=(1, 2, 3))
        # Two draws may be equal by chance, and a sample at the edge may have one view only.
        assert same.sum() <= 3


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ({"name": "ps-kd"}, "its own predictions for every sample an epoch before"),
        ({"name": "cs-kd"}, "another sample of the same class"),
        ({"name": "specialist", "classes": [1, 3]}, "every sample of its special classes"),
    ],
)
def test_methods_that_need_every_sample_in_every_epoch_are_refused(root, tmp_path, method, says):
    config = config_for(tmp_path / "out", str(root / "crops"), method=method)
    with pytest.raises(UnsupportedError, match=says) as refused:
        train(config)
    assert "augment.repeats=4 an epoch visits one sample in 4" in str(refused.value)
    assert not (tmp_path / "out").exists()
