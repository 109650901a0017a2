"""A student of digits, and the losses that the project's own trainer gives it at each step."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from distill.config import TrainConfig
from distill.reporting import Event
from distill.trainer import train
from support.builds import record_toy
from support.toys import TinyNet

QUIET = [
    # Lightning's own calls, and its advice about workers.
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

BATCH = 128
EPOCHS = 3
"""One more than there are seeds."""


def student(num_classes: int = 10) -> TinyNet:
    """A network with batch norm, the same weights at each call, and what timm asks for."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = TinyNet(num_classes)
    net.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return net


def record_digits(url: str, **changes: Any) -> None:
    """Record 1,442 images of 8 x 8 pixels under two seeds, in three shards each."""
    settings = {
        "dataset": {"name": "digits"},
        "augment": {"size": 8, "ops": [{"op": "pad_crop", "padding": 1}]},
        "scales": [1],
        "layout": {"shard_rows": 512, "chunk_rows": 64},
        "batch_size": 512,
    }
    record_toy(url, **(settings | changes))


def own_losses(url: str, out: Any, **changes: Any) -> list[float]:
    """The losses of `kd-cache train` at each update."""
    config = TrainConfig.model_validate(
        {
            "dataset": {"name": "digits"},
            "caches": url,
            "student": {"model": f"{__name__}:student", "mean": [0.5] * 3, "std": [0.5] * 3},
            "method": {"name": "kd", "temperature": 4.0, "alpha": 0.9},
            "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 0.0},
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "workers": 0,
            "loader": "workers",
            "device": "cpu",
            "log_every": 1,
            "out": str(out),
        }
        | changes
    )
    losses = []

    def listen(event: Event) -> None:
        if event.kind == "step":
            losses.append(event.values["loss"])

    train(config, on_event=listen)
    return losses


def example(name: str, library: str) -> Any:
    """An example as a module; the test is skipped where its library is not installed."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    return importlib.import_module(f"examples.{name}")


def lightning_trainer(lightning: Any, folder: Any, **settings: Any) -> Any:
    """Lightning's Trainer, silent."""
    return lightning.Trainer(
        **{
            "max_epochs": EPOCHS,
            "use_distributed_sampler": False,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
        }
        | settings
    )


def watched_trainer(
    loop: Any, cache: Any, images: Any, folder: Any, losses: list[float], **settings: Any
) -> Any:
    """The Trainer of the example, with its own trainer's settings; fills `losses`."""

    class Watched(loop.DistillationTrainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            answer = super().compute_loss(*arguments, **options)
            losses.append((answer[0] if isinstance(answer, tuple) else answer).item())
            return answer

    settings = {
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": EPOCHS,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "output_dir": str(folder),
    } | settings
    return loop.trainer_of(cache, images, student(), kind=Watched, **settings)
