"""Views cut on the device are the ordinary stream's, byte for byte, with the same rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.builds import record_toy
from support.streams import train_config

from cache_service.errors import ViewDriftError
from cli.experiments.reproduce.resident import ResidentStream, open_resident
from distill.stream import open_stream
from distill.train import train

TOYS = {"name": "support.toys:patches", "args": {"num_samples": 50}}
CPU = torch.device("cpu")
RECIPES = {
    "cifar": {"preset": "cifar", "size": 16},
    "crop": {"size": 16, "ops": [{"op": "pad_crop", "padding": 3}]},
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


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_every_batch_is_the_ordinary_one(recipe):
    config = live(recipe, method={"name": "ce"}, epochs=3)
    resident, ordinary = open_resident([config]), open_stream(config, device=CPU)
    assert isinstance(resident, ResidentStream)
    assert resident.facts == ordinary.facts
    pairs = list(zip(resident.batches(2), ordinary.batches(2), strict=True))
    assert len(pairs) == 3 * resident.facts.plan.steps_per_epoch - 2
    for one, other in pairs:
        equal(one, other)


def test_rows_of_a_cache_come_along_and_second_views_too(tmp_path):
    cache = record_toy(str(tmp_path / "cache"), dataset=TOYS, seeds="0:3", codec={"kind": "int8"})
    config = train_config(
        "unused", dataset=TOYS, caches=[cache.url], method={"name": "ddgsd"}, batch_size=16
    )
    resident = open_resident([config])
    ordinary = open_stream(config, device=CPU, methods=[config.method])
    for one, other in zip(resident.batches(0), ordinary.batches(0), strict=True):
        equal(one, other)
        equal(one.other_views["second_view"], other.other_views["second_view"])
        told = [
            stream.teacher_logits(batch, temperature=1.0, cache=0)
            for stream, batch in (
                (resident, one.other_views["second_view"]),
                (ordinary, other.other_views["second_view"]),
            )
        ]
        assert torch.equal(*told)


def test_a_run_may_go_on_with_either(tmp_path):
    shared = {"method": {"name": "ce"}, "student__model": "support.streams:normed_net"}
    whole = train(live("cifar", tmp_path / "whole", epochs=4, **shared))
    half = live("cifar", tmp_path / "half", epochs=4, **shared)

    def stop(event):
        if event.kind == "epoch" and event.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(half, on_event=stop)
    resumed = train(half, stream=open_resident([half]))
    for name, weight in whole.student.model.state_dict().items():
        assert torch.equal(weight, resumed.student.model.state_dict()[name]), name


@pytest.mark.parametrize(
    "augment",
    [
        {"preset": "none", "size": 16},
        {"preset": "cifar", "size": 12},
        {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}]},
        {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "color_jitter"}]},
    ],
    ids=["none", "resized", "mixed", "colors"],
)
def test_other_recipes_are_streamed_as_always(augment):
    config = live("cifar", augment=augment, method={"name": "ce"})
    assert not isinstance(open_resident([config]), ResidentStream)


def test_a_method_that_needs_classmates_is_streamed_as_always():
    config = live("cifar", method={"name": "cs-kd"})
    assert not isinstance(open_resident([config]), ResidentStream)


def test_views_that_are_not_the_rendered_ones_are_refused():
    stream = open_resident([live("cifar", method={"name": "ce"})])
    stream._padded_NHW3 = torch.from_numpy(np.roll(stream._padded_NHW3.numpy(), 1, axis=1))
    with pytest.raises(ViewDriftError, match="seed 0 cut on cpu"):
        next(stream.batches(0))
