"""Views made on the device are the ordinary stream's, byte for byte, with the same rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builds import record_toy
from support.streams import train_config
from support.toys import Patches
from torch.utils._python_dispatch import TorchDispatchMode

from cache_service.errors import ConfigError, ViewDriftError
from cache_service.views.order import epoch_order
from distill.finite import NonFiniteCheck
from distill.reporting import read_metrics
from distill.step import TrainContext, train_step
from distill.stream import open_stream
from distill.students import make_student_state
from distill.trainer import train

TOYS = {"name": "support.toys:patches", "args": {"num_samples": 50}}
CPU = torch.device("cpu")
MIXED = [
    {"op": "pad_crop", "padding": 2},
    {"op": "random_erasing", "fill": "noise", "prob": 0.7},
    {"op": "horizontal_flip"},
    {"op": "random_erasing", "prob": 0.5},
    {"op": "mixup", "prob": 0.8},
    {"op": "cutmix"},
]
RECIPES = {
    "mixed": {"size": 16, "ops": MIXED},
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
def test_every_batch_is_that_of_the_workers(recipe, monkeypatch):
    # The views are made in parts: here of 7 views, of which 6 are taken to keep pairs whole.
    monkeypatch.setattr("distill.on_device.PART_BYTES", 7 * 16 * 16 * 3)
    on_device, ordinary = streams(live(recipe, method={"name": "ce"}, epochs=3))
    assert on_device.on_device is not None
    assert ordinary.on_device is None
    assert on_device.facts == ordinary.facts._replace(loader="the device")
    pairs = list(zip(on_device.batches(2), ordinary.batches(2), strict=True))
    assert len(pairs) == 3 * on_device.facts.plan.steps_per_epoch - 2
    for one, other in pairs:
        equal(one, other)


part = st.floats(0.01, 1)
ranges = st.tuples(part, part).map(sorted)
prob = st.sampled_from([0, 0.3, 1])
interpolation = st.sampled_from(["bilinear", "bicubic"])


def op(name, **fields):
    return st.fixed_dictionaries({"op": st.just(name), **fields})


framings = op(
    "pad_crop", padding=st.integers(0, 9), mode=st.sampled_from(["constant", "reflect"])
) | op("center_crop", crop_pct=st.floats(0.5, 1), interpolation=interpolation)
erasing = op(
    "random_erasing",
    prob=prob,
    area=ranges,
    ratio=st.tuples(st.floats(0.1, 1), st.floats(1, 5)),
    fill=st.sampled_from(["mean", "noise"]),
)
mixings = st.lists(
    op("mixup", alpha=st.floats(0.1, 4), prob=prob)
    | op("cutmix", alpha=st.floats(0.1, 4), prob=prob),
    max_size=2,
    unique_by=lambda each: each["op"],
)


@st.composite
def live_runs(draw):
    """Train files of any recipe that the device can be exact for, and a step to resume at."""
    flips_and_boxes = st.lists(op("horizontal_flip", prob=prob) | erasing, max_size=4)
    ops = [draw(framings), *draw(flips_and_boxes), *draw(mixings)]
    size, epochs = draw(st.integers(8, 20)), draw(st.integers(1, 4))
    samples = {"num_samples": draw(st.integers(3, 40)), "side": draw(st.integers(7, 24))}
    config = train_config(
        "unused",
        dataset={"name": "support.toys:patches", "args": samples},
        caches=[],
        augment={"size": size, "ops": ops, "repeats": draw(st.integers(1, 3))},
        method={"name": draw(st.sampled_from(["ce", "ddgsd"]))},
        seeds=draw(st.lists(st.integers(0, 2**30).map(str), min_size=2, max_size=3, unique=True)),
        batch_size=draw(st.integers(2, 13)),
        epochs=epochs,
    )
    return config, draw(st.integers(0, 2 * epochs))


@settings(max_examples=40, deadline=None)
@given(live_runs())
def test_any_recipe_of_copies_and_blends_gives_the_same_bytes_from_any_step_on(run):
    config, first_step = run
    on_device, ordinary = streams(config)
    count = 0
    for one, other in zip(on_device.batches(first_step), ordinary.batches(first_step), strict=True):
        equal(one, other)
        assert one.other_views.keys() == other.other_views.keys()
        for name, views in one.other_views.items():
            equal(views, other.other_views[name])
        count += 1
    assert count == max(on_device.facts.plan.num_steps - first_step, 0)


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
    cache = record_toy(
        str(tmp_path / "cache"),
        dataset=TOYS,
        seeds="0:3",
        codec={"kind": "int8"},
        augment=RECIPES["mixed"] if compared is None else RECIPES["cifar"],
    )
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
        ({"preset": "imagenet", "size": 16}, "random_resized_crop"),
        ({"preset": "deit", "size": 16}, "rand_augment, random_resized_crop"),
        ({"size": 16, "ops": [{"op": "pad_crop"}, {"op": "color_jitter"}]}, "color_jitter"),
        ({"size": 16, "ops": [{"op": "pad_crop"}, {"op": "random_affine"}]}, "random_affine"),
        ({"size": 16, "callable": "support.pipelines:noisy"}, "support.pipelines:noisy"),
    ],
    ids=["imagenet", "deit", "colors", "affine", "callable"],
)
def test_where_the_device_cannot_be_exact_auto_uses_workers_and_device_is_refused(augment, reason):
    config = live("cifar", augment=augment, method={"name": "ce"})
    stream = open_stream(config, device=CPU)
    assert stream.on_device is None
    assert f"because the recipe has {reason}, and only pad_crop" in stream.facts.loader
    with pytest.raises(ConfigError, match=f"loader: device is not possible here: .*{reason}"):
        open_stream(config.model_copy(update={"loader": "device"}), device=CPU)


def test_a_dataset_that_is_too_large_for_the_device_is_left_to_workers(monkeypatch):
    num_bytes = 50 * (24 * 24 * 3 + 2 * 16 * 16 * 3)
    monkeypatch.setattr("distill.on_device.MAX_BYTES", num_bytes - 1)
    config = live("cifar", method={"name": "ce"})
    stream = open_stream(config, device=CPU)
    assert stream.on_device is None
    assert "because images, views and rows would take" in stream.facts.loader
    monkeypatch.setattr("distill.on_device.MAX_BYTES", num_bytes)
    assert open_stream(config, device=CPU).on_device is not None


@pytest.mark.parametrize(
    ("workers", "what"), [(2, "loader processes (workers: 2)"), (0, "this process")]
)
def test_processes_on_cpus_make_only_their_own_views_unless_device_is_requested(workers, what):
    config = live("cifar", method={"name": "ce"}, workers=workers)
    assert open_stream(config, device=CPU).facts.loader == "the device"
    stream = open_stream(config, device=CPU, world=2)
    assert stream.on_device is None
    assert stream.facts.loader == f"{what}, because each process makes only its part of the views"
    config = config.model_copy(update={"loader": "device"})
    assert open_stream(config, device=CPU, world=2).on_device is not None


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
    views._framed_NHW3 = torch.from_numpy(np.roll(views._framed_NHW3.numpy(), 1, axis=1))
    with pytest.raises(ViewDriftError, match="seed 0 that are made on cpu differ"):
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


class Transfers(TorchDispatchMode):
    """Collects operations that wait for a device, or that copy between one and the host."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, masks = func.overloadpacket.__name__, ()
        if name == "index":  # a mask as an index makes a tensor whose size the host must know
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        moves = "device" in (kwargs or {}) and name == "_to_copy"
        if name in self.WAITS or name == "lift_fresh" or masks or moves:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_waits_and_copies_are_noticed():
    values = torch.arange(4)
    with Transfers() as transfers:
        float(values[0])
        values[values > 1]
        values.to("meta")
        torch.tensor([1])
    assert transfers.found == ["_local_scalar_dense", "index", "_to_copy", "lift_fresh"]


@pytest.mark.parametrize("method", ["ce", "kd", "sd-kd", "sd-dkd", "sd-nkd", "ddgsd"])
def test_a_steady_step_neither_waits_nor_copies_from_the_host(tmp_path, monkeypatch, method):
    augment = RECIPES["cifar" if method == "ddgsd" else "mixed"]  # ddgsd refuses mixed views
    cache = record_toy(str(tmp_path / "cache"), dataset=TOYS, augment=augment)
    config = train_config(
        "unused",
        dataset=TOYS,
        caches=[cache.url],
        batch_size=16,
        method={"name": method},
        student__model="support.streams:normed_net",
    )
    stream = open_stream(config, device=CPU, methods=[config.method])
    # The check of a GPU, which reads the losses of many steps at once.
    context = TrainContext(stream, CPU, NonFiniteCheck(torch.device("cuda")))
    student = make_student_state(config, stream, CPU)
    batches = stream.batches(0)
    train_step(context, [student], [next(batches)])
    # The arrays of the host are only read when an epoch begins.
    for name in ("from_numpy", "tensor", "as_tensor"):
        monkeypatch.delattr(torch, name)
    with Transfers() as transfers:
        for batch in itertools.islice(batches, 2):
            train_step(context, [student], [batch])
    assert transfers.found == []
