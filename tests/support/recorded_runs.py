"""Recorded toys, each with its teacher live beside it, and short runs under either."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cache_service.format.cells import expand_cells
from distill.stream import LiveTeacher, open_stream
from distill.students import make_student
from distill.trainer import train
from support.builds import open_toy, run_build
from support.streams import train_config

NUM_CLASSES = 12
TOYS = {"name": "support.toys:patches", "args": {"num_samples": 96, "num_classes": NUM_CLASSES}}
AUGMENT = {
    "plain": {"preset": "cifar", "size": 16},
    "mixed": {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}, {"op": "cutmix"}]},
}
CODECS = {
    "dense": {"kind": "dense"},
    "features": {"kind": "features"},
    "int8": {"kind": "int8"},
    "topk": {"kind": "topk", "k": 6},
}
WIDTHS = (12, 10)
"""Of the teachers, which are otherwise alike: with different widths their logits differ."""


class Variant(NamedTuple):
    """Where the teachers' logits come from. `codec` is None for live teachers."""

    codec: str | None
    augment: str


class ShortRun(NamedTuple):
    """The loss of every step, and how far the weights moved during the run."""

    losses: list[float]
    moved_P: torch.Tensor


class RecordedRuns:
    """Teachers by number, recorded or live, and runs under them."""

    def __init__(self, folder):
        self._folder = folder
        self._made = {}

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _build(self, variant, teacher):
        return open_toy(
            str(self._folder / f"{variant.codec}-{variant.augment}-{teacher}"),
            dataset=TOYS,
            augment=AUGMENT[variant.augment],
            teacher__model_args={"width": WIDTHS[teacher]},
            codec=CODECS[variant.codec or "dense"],
            seeds="0:2",
        )

    def url(self, variant, teacher=0):
        """The cache of a teacher, recorded when it is first used."""
        return self._once((variant, teacher), lambda: run_build(self._build(variant, teacher)).url)

    def live(self, variant, teacher=0):
        """The same teacher beside the student."""
        build = self._once(
            ("build", variant.augment, teacher), lambda: self._build(variant, teacher)
        )
        spec = build.spec

        def answer(views_BHW3):
            stored = np.asarray(build.teacher.answer(views_BHW3), np.float32)
            return torch.from_numpy(expand_cells(stored, spec.scales, spec.stored_scales))

        config = self.config("unused", Variant("dense", variant.augment), [teacher])
        facts = open_stream(config, device=torch.device("cpu")).facts.teachers[0]
        return LiveTeacher(facts._replace(drops_classes=False), answer)

    def config(self, out, variant, teachers, **changes):
        if variant.codec is None:
            changes |= {"caches": [], "augment": AUGMENT[variant.augment], "seeds": "0:2"}
        else:
            changes |= {"caches": [self.url(variant, teacher) for teacher in teachers]}
        settings = {
            "student": {"model": "support.streams:normed_net"},
            "optimizer": {"name": "sgd", "lr": 0.02},
            "epochs": 1,
            "batch_size": 20,
        }
        return train_config(out, dataset=TOYS, **(settings | changes))

    def run(self, variant, method, *, num_teachers=1, **changes):
        """A short run under these teachers."""
        key = (variant, repr(method), num_teachers, repr(changes))
        return self._once(key, lambda: self._train(variant, method, range(num_teachers), changes))

    def _train(self, variant, method, teachers, changes):
        found = []

        def note(event):
            if event.kind == "step":
                found.append(event.values["loss"])

        out = str(self._folder / f"run{len(self._made)}")
        config = self.config(out, variant, teachers, method=method, **changes)
        live = (
            [self.live(variant, teacher) for teacher in teachers] if variant.codec is None else []
        )
        result = train(config, teachers=live, on_event=note)
        start = make_student(
            config.student, num_classes=NUM_CLASSES, view_size=16, teacher=None, seed=config.seed
        )
        moved = [
            (now.detach() - before.detach()).flatten()
            for now, before in zip(
                result.student.model.parameters(), start.model.parameters(), strict=True
            )
        ]
        return ShortRun(found, torch.cat(moved))
