"""Views cut on the device are the ordinary stream's, byte for byte, with the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.builds import record_toy
from support.streams import train_config
from support.toys import Patches

from cache_service.errors import ConfigError, ViewDriftError
from cache_service.views.order import epoch_order
from distill.reporting import read_metrics
from distill.stream import open_stream
from distill.trainer import train

TOYS = {"name": "support.toys:patches", "args": {"num_samples": 50}}
CPU = torch.device("cpu")
RECIPES = {
    "cifar": {"preset": "cifar", "size": 16},
    "crop": {"size": 16, "ops": [{"op": "pad_crop", "padding": 3}]},
    "resized": {"preset": "cifar", "size": 12},
    "reflect": {
        "size": 16,
        "ops": [{"op": "pad_crop", "mode": "reflect"}, {"op": "horizontal_flip", "prob": 0.3}],
    },
}


def equal(one, other):
    for name in ("images_BHW3", "labels_B", "partner_labels_B", "weights_B", "samples_B"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.cursor == other.cursor
    for mine, theirs in zip(one.rows, other.rows, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def live(recipe, out="unused", **changes):
    settings = {"dataset": TOYS, "caches": [], "augment": RECIPES[recipe], "batch_size": 16}
    return train_config(out, **(settings | changes))


def streams(config):
    """The stream on the device and that of the workers."""
    methods = [config.method]
    return tuple(
        open_stream(config.model_copy(update={"loader": loader}), device=CPU, methods=methods)
        for loader in ("device", "workers")
    )


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_batch_is_that_of_the_workers(recipe):
    on_device, ordinary = streams(live(recipe, method={"name": "ce"}, epochs=3))
    assert on_device.on_device is not None
    assert on_device.facts == ordinary.facts
    pairs = list(zip(on_device.batches(2), ordinary.batches(2), strict=True))
    assert len(pairs) == 3 * on_device.facts.plan.steps_per_epoch - 2
    for one, other in pairs:
        equal(one, other)


@pytest.mark.parametrize(
    ("method", "compared"),
    [
        ({"name": "ddgsd"}, "second_view"),
        ({"name": "cs-kd"}, "same_class_pair"),
        ({"name": "specialist", "classes": [1, 2]}, None),
    ],
    ids=lambda each: each["name"] if isinstance(each, dict) else each,
)
def test_rows_and_the_other_views_of_a_method_are_those_of_the_workers(tmp_path, method, compared):
    cache = record_toy(str(tmp_path / "cache"), dataset=TOYS, seeds="0:3", codec={"kind": "int8"})
    config = train_config(
        "unused", dataset=TOYS, caches=[cache.url], method=method, batch_size=16, epochs=4
    )
    on_device, ordinary = streams(config)
    for one, other in zip(on_device.batches(0), ordinary.batches(0), strict=True):
        equal(one, other)
        logits = [
            stream.teacher_logits(batch, temperature=1.0, cache=0)
            for stream, batch in ((on_device, one), (ordinary, other))
        ]
        assert torch.equal(*logits)
        if compared is not None:
            equal(one.other_views[compared], other.other_views[compared])


def test_losses_are_the_same_with_either_loader_and_a_run_resumes_with_the_other(tmp_path):
    shared = {"method": {"name": "ce"}, "student__model": "support.streams:normed_net", "epochs": 4}
    whole = train(live("cifar", tmp_path / "whole", loader="workers", **shared))
    train(live("cifar", tmp_path / "device", loader="device", **shared))
    half = live("cifar", tmp_path / "half", loader="workers", **shared)

    def stop(event):
        if event.kind == "epoch" and event.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(half, on_event=stop)
    resumed = train(half.model_copy(update={"loader": "device"}))
    for name, weight in whole.student.model.state_dict().items():
        assert torch.equal(weight, resumed.student.model.state_dict()[name]), name
    losses = {
        out: [line["loss"] for line in read_metrics(str(tmp_path / out)) if line["kind"] == "step"]
        for out in ("whole", "device", "half")
    }
    assert losses["whole"] == losses["device"] == losses["half"]
    assert len(losses["whole"]) == 4 * 4


@pytest.mark.parametrize(
    ("augment", "reason"),
    [
        ({"preset": "none", "size": 16}, "made by center_crop"),
        ({"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}]}, "pad_crop, mixup"),
        ({"size": 16, "ops": [{"op": "pad_crop"}, {"op": "color_jitter"}]}, "color_jitter"),
        ({"size": 16, "callable": "support.pipelines:noisy"}, "support.pipelines:noisy"),
    ],
    ids=["none", "mixed", "colors", "callable"],
)
def test_where_the_device_cannot_be_exact_auto_uses_workers_and_device_is_refused(augment, reason):
    config = live("cifar", augment=augment, method={"name": "ce"})
    assert open_stream(config, device=CPU).on_device is None
    with pytest.raises(ConfigError, match=f"loader: device is not possible here: .*{reason}"):
        open_stream(config.model_copy(update={"loader": "device"}), device=CPU)


def test_a_dataset_that_is_too_large_for_the_device_is_left_to_workers(monkeypatch):
    monkeypatch.setattr("distill.on_device.MAX_BYTES", 50 * 24 * 24 * 3 - 1)
    config = live("cifar", method={"name": "ce"})
    assert open_stream(config, device=CPU).on_device is None
    monkeypatch.setattr("distill.on_device.MAX_BYTES", 50 * 24 * 24 * 3)
    assert open_stream(config, device=CPU).on_device is not None


def test_images_much_larger_than_their_views_are_decoded_by_workers():
    config = live("cifar", augment={"preset": "cifar", "size": 8}, method={"name": "ce"})
    assert open_stream(config, device=CPU).on_device is not None
    dataset = {**TOYS, "args": {"num_samples": 50, "side": 17}}
    config = live(
        "cifar", dataset=dataset, augment={"preset": "cifar", "size": 8}, method={"name": "ce"}
    )
    assert open_stream(config, device=CPU).on_device is None


def test_rows_that_are_waited_for_are_read_a_few_at_a_time(tmp_path):
    cache = record_toy(str(tmp_path / "cache"), dataset=TOYS)
    source = {"url": cache.url, "wait_s": 5}
    config = train_config("unused", dataset=TOYS, caches=[source], batch_size=16)
    assert open_stream(config, device=CPU).on_device is None
    config = train_config("unused", dataset=TOYS, caches=[cache.url], batch_size=16)
    assert open_stream(config, device=CPU).on_device is not None


def test_views_that_are_not_the_rendered_ones_are_refused():
    stream, _ = streams(live("cifar", method={"name": "ce"}))
    views = stream.on_device
    views._padded_NHW3 = torch.from_numpy(np.roll(views._padded_NHW3.numpy(), 1, axis=1))
    with pytest.raises(ViewDriftError, match="seed 0 that are cut on cpu differ"):
        next(stream.batches(0))


def test_one_changed_pixel_of_any_sample_is_refused_before_the_first_step(tmp_path, monkeypatch):
    cache = record_toy(str(tmp_path / "cache"), dataset=TOYS)
    config = train_config(
        "unused", dataset=TOYS, caches=[cache.url], batch_size=16, replay={"max_drift": 255}
    )
    stream = open_stream(config, device=CPU)
    last, read = int(epoch_order(50, 0)[-1]), Patches.__getitem__

    def changed(self, index):
        image, label = read(self, index)
        return (image.point(lambda level: level ^ 64) if index == last else image), label

    monkeypatch.setattr(Patches, "__getitem__", changed)
    with pytest.raises(ViewDriftError, match=f"the view of sample {last} .*its image or its draws"):
        next(stream.batches(0))
    assert stream.on_device is not None
