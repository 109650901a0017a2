"""Training on a GPU: loaders, autocast, compiled code, resuming, and no waits in a steady step."""

from __future__ import annotations

import itertools
import warnings
from contextlib import contextmanager

import pytest
import torch
from support.builds import record_toy
from support.streams import train_config

from distill.finite import NonFiniteCheck
from distill.reporting import read_metrics
from distill.step import TrainContext, train_step
from distill.stream import open_stream
from distill.students import make_student_state
from distill.trainer import train

TOYS = {"name": "support.toys:patches", "args": {"num_samples": 96}}
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    url = str(tmp_path_factory.mktemp("recorded") / "cache")
    return record_toy(url, dataset=TOYS, seeds="0:2", codec={"kind": "dense"}, device="cpu").url


def config_for(out, cache, **changes):
    settings = {
        "dataset": TOYS,
        "caches": cache,
        "student": {"model": "resnet8x4"},
        "method": {"name": "sd-kd"},
        "batch_size": 16,
        "epochs": 4,
        "device": "cuda",
        "loader": "device",
    }
    return train_config(out, **(settings | changes))


@contextmanager
def waits_refused():
    """Raise an error wherever the host waits for the GPU."""
    with warnings.catch_warnings(action="ignore"):  # the debug mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses(out):
    return [line["loss"] for line in read_metrics(str(out)) if line["kind"] == "step"]


@pytest.fixture(scope="module")
def mixed_cache(tmp_path_factory):
    ops = [
        {"op": "pad_crop", "padding": 2, "mode": "reflect"},
        {"op": "random_erasing", "fill": "noise", "prob": 0.7},
        {"op": "horizontal_flip"},
        {"op": "random_erasing", "prob": 0.5},
        {"op": "mixup", "prob": 0.8},
        {"op": "cutmix"},
    ]
    url = str(tmp_path_factory.mktemp("recorded") / "mixed")
    augment = {"size": 16, "ops": ops}
    return record_toy(url, dataset=TOYS, seeds="0:2", augment=augment, device="cpu").url


@pytest.mark.parametrize("recorded", ["cache", "mixed_cache"])
def test_batches_of_the_device_loader_are_those_of_the_workers(request, recorded):
    config = config_for("unused", request.getfixturevalue(recorded))
    on_device, ordinary = (
        open_stream(config.model_copy(update={"loader": loader}), device=GPU)
        for loader in ("device", "workers")
    )
    for mine, theirs in zip(on_device.batches(0), ordinary.batches(0), strict=True):
        assert mine.images_BHW3.is_cuda
        assert torch.equal(mine.images_BHW3.cpu(), theirs.images_BHW3)
        for name in ("labels_B", "partner_labels_B", "weights_B", "samples_B"):
            assert torch.equal(getattr(mine, name).cpu(), getattr(theirs, name)), name
        for one, other in zip(mine.rows, theirs.rows, strict=True):
            assert all(torch.equal(one[name].cpu(), other[name]) for name in other)


@pytest.mark.parametrize("loader", ["device", "workers"])
def test_losses_are_those_of_the_cpu(tmp_path, cache, loader):
    train(config_for(tmp_path / "gpu", cache, loader=loader, epochs=1))
    train(config_for(tmp_path / "cpu", cache, device="cpu", loader="workers", epochs=1))
    ours, theirs = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    # TF32 rounds the factors of convolutions to 10 bits, and every step adds to the difference.
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"amp": "bfloat16", "channels_last": True},
        {"amp": "float16"},
        {"compile": True},
        {"compile": True, "ema": 0.9, "method": {"name": "kd"}},
    ],
    ids=["bfloat16", "float16", "compiled", "compiled with ema"],
)
def test_a_form_of_the_step_learns_what_the_plain_one_does(tmp_path, cache, changes):
    plain = {"method": changes["method"]} if "method" in changes else {}
    train(config_for(tmp_path / "changed", cache, **changes))
    train(config_for(tmp_path / "plain", cache, **plain))
    assert losses(tmp_path / "changed") == pytest.approx(losses(tmp_path / "plain"), rel=0.1)


@pytest.mark.parametrize("changes", [{}, {"compile": True}], ids=["plain", "compiled"])
def test_a_stopped_run_resumes_to_the_curve_of_a_whole_one(tmp_path, cache, changes):
    changes = {"amp": "bfloat16"} | changes
    train(config_for(tmp_path / "whole", cache, **changes))

    def stop(event):
        if event.kind == "epoch" and event.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_for(tmp_path / "halves", cache, **changes), on_event=stop)
    train(config_for(tmp_path / "halves", cache, **changes))
    # The gradient of a convolution is summed in any order on a GPU.
    assert losses(tmp_path / "halves") == pytest.approx(losses(tmp_path / "whole"), rel=2e-2)


@pytest.mark.parametrize("method", ["ce", "kd", "sd-kd", "sd-dkd", "sd-nkd", "dkd", "nkd"])
@pytest.mark.parametrize("loader", ["device", "workers"])
def test_the_host_does_not_wait_for_the_gpu_in_a_steady_step(cache, method, loader):
    config = config_for(
        "unused", cache, method={"name": method}, loader=loader, workers=0, epochs=100
    )
    stream = open_stream(config, device=GPU, methods=[config.method])
    context = TrainContext(stream, GPU, NonFiniteCheck(GPU))
    student = make_student_state(config, stream, GPU)
    groups = [[batch] for batch in itertools.islice(stream.batches(0), 6)]
    if loader == "workers":
        groups = [[batch.pin_memory()] for [batch] in groups]
    train_step(context, [student], groups[0])
    with waits_refused():
        for group in groups[1:]:
            train_step(context, [student], group)


@pytest.mark.parametrize("recorded", ["cache", "mixed_cache"])
def test_the_device_loader_makes_a_batch_without_waiting_for_the_gpu(request, recorded):
    stream = open_stream(config_for("unused", request.getfixturevalue(recorded)), device=GPU)
    batches = stream.batches(0)
    next(batches)
    with waits_refused():
        for _ in range(4):
            next(batches)
