"""With more epochs than seeds, a later pass over a seed has its views in other batches."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from support.builds import record_toy
from support.origin import serving
from support.runs import same, state_of
from support.streams import train_config

from cache_service.views.order import pass_order
from distill.reporting import read_metrics
from distill.stream import open_stream
from distill.trainer import train

CPU = torch.device("cpu")
MIXED = {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}]}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("passes")
    record_toy(str(folder / "plain"))
    record_toy(str(folder / "mixed"), augment=MIXED)
    record_toy(str(folder / "repeated"), augment={"preset": "cifar", "size": 16, "repeats": 3})
    record_toy(str(folder / "zstd"), codec={"kind": "dense", "compression": "zstd"})
    return folder


def config_for(out, cache, **changes):
    settings = {
        "dataset": {"name": "support.toys:patches", "args": {"num_samples": 96}},
        "caches": cache,
        "student": {"model": "support.streams:normed_net"},
        "method": {"name": "sd-kd"},
        "batch_size": 20,
        "epochs": 6,
        "loader": "workers",
    }
    return train_config(out, **(settings | changes))


def stream_of(cache, **changes):
    config = config_for("unused", cache, **changes)
    return open_stream(config, device=CPU, methods=[config.method])


def views_of(batches):
    """Digest-like keys of all views of some batches, with the rows that came with them."""
    return [
        (view.numpy().tobytes(), row.numpy().tobytes(), int(label), float(weight))
        for batch in batches
        for view, row, label, weight in zip(
            batch.images_BHW3, batch.rows[0]["logits"], batch.labels_B, batch.weights_B, strict=True
        )
    ]


def losses(out):
    return [line["loss"] for line in read_metrics(str(out)) if line["kind"] == "step"]


@pytest.mark.parametrize("name", ["plain", "mixed", "repeated", "zstd"])
@pytest.mark.parametrize("loader", ["workers", "device"])
def test_every_pass_has_the_recorded_views_once_in_other_batches(root, name, loader):
    if name == "mixed" and loader == "device":
        loader = "auto"
    epochs = {}
    for batch in stream_of(str(root / name), loader=loader, batch_size=16).batches(0):
        epochs.setdefault(batch.cursor.epoch, []).append(batch)
    for seed in (0, 1):
        first, *later = (views_of(epochs[epoch]) for epoch in (seed, seed + 2, seed + 4))
        assert len(first) == 96
        for again in later:
            assert sorted(again) == sorted(first)
            assert again != first
        recorded = {frozenset(batch.samples_B.tolist()) for batch in epochs[seed]}
        others = {frozenset(batch.samples_B.tolist()) for batch in epochs[seed + 2]}
        assert recorded & others == set()
    assert [b.samples_B.tolist() for b in epochs[2]] != [b.samples_B.tolist() for b in epochs[4]]


@pytest.mark.parametrize("name", ["plain", "repeated"])
@pytest.mark.parametrize(("first", "workers"), [(0, 2), (11, 0), (18, 2)])
def test_passes_are_the_same_with_workers_and_from_the_middle(root, name, first, workers):
    whole = list(stream_of(str(root / name), workers=0).batches(0))
    again = list(stream_of(str(root / name), workers=workers).batches(first))
    assert len(again) == len(whole) - first
    assert views_of(again) == views_of(whole[first:])


def test_over_http_with_and_without_a_disk_cache_passes_are_those_of_the_folder(
    root, tmp_path, monkeypatch
):
    monkeypatch.delenv("KD_CACHE_TOKEN", raising=False)
    with serving(root) as server:
        for name in ("mixed", "repeated"):
            wanted = views_of(stream_of(str(root / name), workers=0).batches(0))
            kept = {"url": server.url(name), "disk_cache": str(tmp_path / name)}
            for cache in (server.url(name), kept):
                assert views_of(stream_of([cache], workers=0).batches(0)) == wanted


def test_a_later_pass_is_read_from_the_disk_cache(root, tmp_path, monkeypatch):
    monkeypatch.delenv("KD_CACHE_TOKEN", raising=False)
    with serving(root) as server:
        kept = {"url": server.url("plain"), "disk_cache": str(tmp_path / "disk")}
        for _ in stream_of([kept], workers=0, epochs=6).batches(0):
            pass
        # Two seeds of three shards: each piece is sent once, and no row is requested by sample.
        assert len(server.targets("/rows?")) == 6
        assert server.targets("/lookup") == []


@pytest.mark.parametrize("stop_at", [12, 17, 25])
def test_a_run_stopped_within_a_later_pass_goes_on_bit_for_bit(tmp_path, root, stop_at):
    train(config_for(tmp_path / "whole", str(root / "mixed")))

    def stop(event):
        if event.kind == "step" and event.step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(config_for(tmp_path / "parts", str(root / "mixed")), on_event=stop)
    train(config_for(tmp_path / "parts", str(root / "mixed")))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_without_caches_each_epoch_is_new_and_read_in_order():
    stream = stream_of([], augment={"preset": "cifar", "size": 16}, method={"name": "ce"})
    assert [batch.cursor.seed for batch in stream.batches(0)] == sorted([*range(6)] * 5)


@pytest.mark.parametrize("method", ["ddgsd", "cs-kd", "specialist"])
def test_other_views_fit_the_views_of_a_later_pass(root, method):
    settings = {"name": method} | ({"classes": [1, 3]} if method == "specialist" else {})
    epochs = {}
    for batch in stream_of(str(root / "plain"), method=settings).batches(0):
        epochs.setdefault(batch.cursor.epoch, []).append(batch)
        for other in batch.other_views.values():
            assert torch.equal(other.labels_B, batch.labels_B)
    first = [sample for batch in epochs[0] for sample in batch.samples_B.tolist()]
    again = [sample for batch in epochs[2] for sample in batch.samples_B.tolist()]
    if method == "specialist":
        order = pass_order(96, 0, 1, 1)
        assert len(set(again)) == len(again) == len(first) < 96
        assert [s for s in again if s % 5 in (1, 3)] != [s for s in first if s % 5 in (1, 3)]
        assert sorted(order.tolist()) == list(range(96))
    else:
        assert sorted(again) == sorted(first)
        assert again != first
