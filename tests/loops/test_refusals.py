"""What each trainer would do to a recorded epoch by itself is refused in words, or does no harm."""

from __future__ import annotations

import pytest
import torch
from support.loops import BATCH, QUIET, example, lightning_trainer, student, watched_trainer
from torch import nn
from torch.utils.data import DataLoader

from cache_service.errors import ConfigError
from distill import CachedDataset

pytestmark = QUIET


@pytest.fixture
def data(cache, images):
    return CachedDataset(cache, images, seeds=cache.complete_seeds())


def test_the_huggingface_trainer_shuffles_by_default_which_is_refused(cache, images, tmp_path):
    loop = example("huggingface_trainer", "transformers")
    trainer = watched_trainer(loop, cache, images, tmp_path, [])
    trainer.args.train_sampling_strategy = "random"
    with pytest.raises(ConfigError, match=r"another order.*train_sampling_strategy='sequential'"):
        trainer.train()


@pytest.mark.parametrize("drops", [True, False])
def test_the_huggingface_trainer_cannot_drop_the_recorded_logits(cache, images, tmp_path, drops):
    # It drops what the signature of `forward` does not name, from items that are dicts.
    loop = example("huggingface_trainer", "transformers")
    trainer = watched_trainer(loop, cache, images, tmp_path, [], remove_unused_columns=drops)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["teacher_logits"].shape == (BATCH, 10)


def test_lightning_sets_the_epoch_of_samplers_only_and_a_loader_without_is_refused(data, tmp_path):
    loop = example("lightning_module", "lightning")

    class Forgotten(loop.Distillation):
        def train_dataloader(self):
            return DataLoader(self.data, BATCH)

    with pytest.raises(ConfigError, match=r"without set_epoch.*Lightning.*data\.sampler\(\)"):
        lightning_trainer(loop.lightning, tmp_path).fit(Forgotten(data, student()))


@pytest.mark.parametrize("shuffled", [True, False])
def test_the_sampler_that_lightning_puts_on_several_devices_is_refused(data, shuffled):
    connector = pytest.importorskip(
        "lightning.pytorch.trainer.connectors.data_connector", reason="lightning is not installed"
    )
    loader = DataLoader(data, BATCH, sampler=data.sampler(0, 2, batch_size=BATCH))
    sampler = connector._get_distributed_sampler(
        loader, shuffled, overfit_batches=0, num_replicas=2, rank=0
    )
    with pytest.raises(ConfigError, match="use_distributed_sampler=False"):
        list(DataLoader(data, BATCH, sampler=sampler))


@pytest.mark.parametrize("split_batches", [False, True])
def test_accelerate_would_repeat_views_on_several_processes_which_is_refused(data, split_batches):
    prepare = pytest.importorskip(
        "accelerate.data_loader", reason="accelerate is not installed"
    ).prepare_data_loader

    def read(rank, **options):
        loader = DataLoader(data, 100, **options)
        loader = prepare(
            loader,
            torch.device("cpu"),
            num_processes=2,
            process_index=rank,
            split_batches=split_batches,
        )
        loader.set_epoch(0)
        return torch.cat([views for views, _, _ in loader])

    # The last batch of an epoch is that of rank 0, or half of it goes to rank 1.
    with pytest.raises(ConfigError, match=r"begins again.*drop_last=True"):
        read(1 if split_batches else 0)
    parts = [read(rank, drop_last=True) for rank in range(2)]
    assert [len(part) for part in parts] == [700, 700]


@pytest.mark.parametrize("batch_size", [64, None])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_accelerate_would_divide_again_is_refused(data, batch_size, workers):
    prepare = pytest.importorskip(
        "accelerate.data_loader", reason="accelerate is not installed"
    ).prepare_data_loader
    loader = DataLoader(
        data, 64, sampler=data.sampler(1, 2, batch_size=batch_size), num_workers=workers
    )
    assert sum(len(labels) for _, labels, _ in loader) == 721
    twice = prepare(loader, torch.device("cpu"), num_processes=2, process_index=0)
    twice.set_epoch(0)
    with pytest.raises(ConfigError, match=r"among 2 processes, and the loader divides it again"):
        list(twice)


def test_a_timm_loader_that_lost_the_recorded_logits_is_refused(data):
    loop = example("timm_task", "timm.task")
    task = loop.RecordedDistillationTask(student(), criterion=nn.CrossEntropyLoss())
    views, labels, _ = next(iter(DataLoader(data, 8)))
    mixed = torch.rand(8, 10)  # what timm's own mixup makes of labels
    for target in (labels, mixed):
        with pytest.raises(ValueError, match=r"lack recorded logits.*without mixup"):
            task(views, target)


def test_the_loader_that_timm_makes_for_training_shuffles_which_is_refused(data):
    loop = example("timm_task", "timm.task")
    loader = pytest.importorskip("timm.data").create_loader(
        data,
        input_size=(3, 8, 8),
        batch_size=BATCH,
        is_training=True,
        collate_fn=loop.collate,
        num_workers=0,
        device=torch.device("cpu"),
    )
    with pytest.raises(ConfigError, match="which is another order"):
        next(iter(loader))
