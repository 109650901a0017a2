"""Every loop takes the steps of the project's own trainer: equal losses at each of them."""

from __future__ import annotations

import re
import runpy

import pytest
import torch
from support.loops import (
    BATCH,
    EPOCHS,
    QUIET,
    example,
    lightning_trainer,
    own_losses,
    record_digits,
    student,
    watched_trainer,
)
from support.pages import ROOT
from torch import nn

from distill import CachedDataset, load_cache

pytestmark = QUIET


@pytest.fixture(scope="module")
def wanted(url, tmp_path_factory):
    losses = own_losses(url, tmp_path_factory.mktemp("own"))
    assert len(losses) == EPOCHS * 12  # the last batch of an epoch is shorter: 1442 = 11 * 128 + 34
    assert losses[-1] < losses[0] / 2
    return losses


def check(losses, wanted):
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "forkserver"}],
    ids=["in line", "persistent workers"],
)
def test_plain_pytorch(cache, images, wanted, options):
    loop = example("own_loop", "torch")
    check(loop.train(cache, images, student(), epochs=EPOCHS, batch_size=BATCH, **options), wanted)


def test_plain_pytorch_with_mixed_views(images, tmp_path):
    url = str(tmp_path / "mixed")
    ops = [{"op": "pad_crop", "padding": 1}, {"op": "mixup"}, {"op": "cutmix"}]
    record_digits(url, augment={"size": 8, "ops": ops})
    loop = example("own_loop", "torch")
    losses = loop.train(load_cache(url), images, student(), epochs=2, batch_size=BATCH)
    check(losses, own_losses(url, tmp_path / "out", epochs=2))


def test_accelerate(cache, images, wanted):
    loop = example("accelerate_loop", "accelerate")
    check(loop.train(cache, images, student(), epochs=EPOCHS, batch_size=BATCH), wanted)


def test_timm(cache, images, wanted):
    loop = example("timm_task", "timm.task")
    task = loop.RecordedDistillationTask(
        student(), criterion=nn.CrossEntropyLoss(), task_loss_weight=0.1, temperature=4.0
    )
    half = (0.5,) * 3
    loader = loop.recorded_loader(
        cache, images, BATCH, mean=half, std=half, device=torch.device("cpu")
    )
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.05, momentum=0.9)
    losses = []
    task.get_trainable_module().train()
    for epoch in range(EPOCHS):  # as in timm's train.py
        loader.dataset.set_epoch(epoch)
        for views, target in loader:
            optimizer.zero_grad()
            result = task(views, target)
            result["loss"].backward()
            optimizer.step()
            losses.append(result["loss"].item())
    check(losses, wanted)


def test_lightning(cache, images, wanted, tmp_path):
    loop = example("lightning_module", "lightning")
    losses = []

    class Watched(loop.Distillation):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            losses.append(loss.item())
            return loss

    data = CachedDataset(cache, images, seeds=cache.complete_seeds())
    lightning_trainer(loop.lightning, tmp_path).fit(Watched(data, student(), batch_size=BATCH))
    check(losses, wanted)


def test_huggingface_trainer(cache, images, wanted, tmp_path):
    loop = example("huggingface_trainer", "transformers")
    losses = []
    watched_trainer(loop, cache, images, tmp_path, losses).train()
    check(losses, wanted)


def test_huggingface_trainer_evaluates_on_every_view_of_a_recording(cache, images, tmp_path):
    loop = example("huggingface_trainer", "transformers")
    trainer = watched_trainer(loop, cache, images, tmp_path, [], per_device_eval_batch_size=100)
    trainer.compute_metrics = lambda answers: {
        "rows": len(answers.predictions),
        "top1": float((answers.predictions.argmax(1) == answers.label_ids).mean()),
    }
    scores = trainer.evaluate(CachedDataset(cache, images, seed=1))
    assert scores["eval_rows"] == 1442
    data = CachedDataset(cache, images, seed=1)
    views, labels, _ = zip(*data.__getitems__(list(range(1442))), strict=True)
    with torch.no_grad():
        right = student().eval()(2 * torch.stack(views) - 1).argmax(1) == torch.tensor(labels)
    assert scores["eval_top1"] == pytest.approx(right.float().mean().item())


LOOPS = ["own_loop", "accelerate_loop", "huggingface_trainer", "lightning_module", "timm_task"]


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_no_longer_than_forty_lines(name):
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 40


def test_a_loop_runs_as_a_script(url, tmp_path, monkeypatch, capsys):
    # The script has a network for larger images; two of its eight epochs' seeds are recorded here.
    (tmp_path / "caches").mkdir()
    (tmp_path / "caches" / "digits-whole").symlink_to(url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cache_service.models.create.create_model", lambda *_, **__: student())
    runpy.run_path(str(ROOT / "examples" / "own_loop.py"), run_name="__main__")
    assert re.match(
        r"loss \d\.\d\d at the first step, 0\.\d\d at the last", capsys.readouterr().out
    )
