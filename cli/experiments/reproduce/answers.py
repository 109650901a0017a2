"""What a trained student says of every image of a dataset.

Shape letters: N samples, B batch, C classes.
"""

from __future__ import annotations

from typing import Any

import torch

from cache_service.configfile import validate_config
from cache_service.datasets import DatasetConfig
from cache_service.errors import ConfigError
from cache_service.models.preprocess import prepare_views
from cli.experiments.reproduce.bias import Labels, Logits
from distill.checkpoint import load_checkpoint
from distill.config import EvaluateConfig, TrainConfig
from distill.evaluate import HeldOut
from distill.students import choose_device, restore_student


@torch.inference_mode()
def student_answers(document: dict[str, Any], dataset: dict[str, Any]) -> tuple[Logits, Labels]:
    """Logits [N, C] and labels [N], in one and the same order.

    Args:
        document: the student's train file; its run has a checkpoint.
        dataset: `dataset:` of what to answer on.

    Raises:
        ConfigError: the run has no checkpoint.
    """
    config = validate_config(TrainConfig, document, where=document["out"])
    payload = load_checkpoint(config.out)
    if payload is None:
        raise ConfigError(f"no checkpoint in {config.out}.", hint="Train the student first.")
    device = choose_device(config.device)
    student = restore_student(payload, config.student)
    model = student.model.to(device).eval()
    images = HeldOut(
        EvaluateConfig(dataset=validate_config(DatasetConfig, dataset, where="dataset")),
        num_classes=payload["num_classes"],
        view_size=payload["view_size"],
        batch_size=1000,
        workers=0,
        classes=payload.get("classes", ()),
    )
    logits, labels = [], []
    for batch in images:
        views_B3HW = prepare_views(batch.images_BHW3, student.preprocess, device=device)
        logits.append(model(views_B3HW).float().cpu())
        labels.append(batch.labels_B)
    return torch.cat(logits).numpy(), torch.cat(labels).numpy()
