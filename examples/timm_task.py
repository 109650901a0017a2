"""The loader and the task that timm's train.py needs for a recorded teacher: docs/loops.md."""

import torch
from timm.data.loader import PrefetchLoader
from timm.task import LogitDistillationTask
from timm.task.distillation import DistillationTeacher
from torch.utils.data import DataLoader, default_collate

from distill import CachedDataset


class Recording(DistillationTeacher):
    def forward(self, input, return_features=False):
        return self.logits


class RecordedDistillationTask(LogitDistillationTask):
    def __init__(self, student_model, **options):
        super().__init__(student_model, Recording(torch.nn.Identity()), **options)
        self.num_classes = student_model.num_classes

    def forward(self, input, target):
        width = target.shape[-1] - self.num_classes
        if target.ndim != 2 or width not in (1, self.num_classes):
            raise ValueError("targets lack recorded logits: use recorded_loader, without mixup")
        labels, self.teacher.logits = target.split([width, self.num_classes], dim=1)
        return super().forward(input, labels[:, 0].long() if width == 1 else labels)


def collate(items):
    """Views, and one target: the label (or the shares of a mixed one), then recorded logits."""
    views, labels, teacher_logits = default_collate(items)
    return views, torch.cat([labels.reshape(len(labels), -1), teacher_logits], dim=1)


def recorded_loader(cache, images, batch_size, *, mean, std, device, **options):
    data = CachedDataset(cache, images, seeds=cache.complete_seeds(), transform=torch.clone)
    sampler = data.sampler(batch_size=batch_size)
    loader = DataLoader(data, batch_size, sampler=sampler, collate_fn=collate, **options)
    return PrefetchLoader(loader, mean=mean, std=std, device=device)
