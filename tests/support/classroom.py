"""Recorded toys, each with its teacher live beside it, and short runs under either."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from cache_service.format.cells import expand_cells
from distill.stream import LiveTeacher, open_stream
from distill.students import make_student
from distill.train import train
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
"""Of the teachers, which are otherwise alike: different widths, different opinions."""


class Way(NamedTuple):
    """Where teachers' answers come from. `codec` is None for live teachers."""

    codec: str | None
    augment: str


class Run(NamedTuple):
    """The loss of every step, and by how much all of them together moved the weights."""

    losses: list[float]
    moved_P: torch.Tensor


class Classroom:
    """Teachers by number, recorded or live, and runs under them."""

    def __init__(self, folder):
        self._folder = folder
        self._made = {}

    def _once(self, key, make):
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _build(self, way, teacher):
        return open_toy(
            str(self._folder / f"{way.codec}-{way.augment}-{teacher}"),
            dataset=TOYS,
            augment=AUGMENT[way.augment],
            teacher__model_args={"width": WIDTHS[teacher]},
            codec=CODECS[way.codec or "dense"],
            seeds="0:2",
        )

    def url(self, way, teacher=0):
        """The cache of a teacher, recorded the first time that it is asked for."""
        return self._once((way, teacher), lambda: run_build(self._build(way, teacher)).url)

    def live(self, way, teacher=0):
        """The same teacher beside the student."""
        build = self._once(("build", way.augment, teacher), lambda: self._build(way, teacher))
        spec = build.spec

        def answer(views_BHW3):
            stored = np.asarray(build.teacher.answer(views_BHW3), np.float32)
            return torch.from_numpy(expand_cells(stored, spec.scales, spec.stored_scales))

        config = self.config("unused", Way("dense", way.augment), [teacher])
        facts = open_stream(config, device=torch.device("cpu")).facts.teachers[0]
        return LiveTeacher(facts._replace(codec=None), answer)

    def config(self, out, way, teachers, **changes):
        if way.codec is None:
            changes |= {"caches": [], "augment": AUGMENT[way.augment], "seeds": "0:2"}
        else:
            changes |= {"caches": [self.url(way, teacher) for teacher in teachers]}
        settings = {
            "student": {"model": "support.streams:normed_net"},
            "optimizer": {"name": "sgd", "lr": 0.02},
            "epochs": 1,
            "batch_size": 20,
        }
        return train_config(out, dataset=TOYS, **(settings | changes))

    def run(self, way, method, *, num_teachers=1, **changes):
        """A short run under these teachers."""
        key = (way, repr(method), num_teachers, repr(changes))
        return self._once(key, lambda: self._train(way, method, range(num_teachers), changes))

    def _train(self, way, method, teachers, changes):
        found = []

        def note(event):
            if event.kind == "step":
                found.append(event.values["loss"])

        out = str(self._folder / f"run{len(self._made)}")
        config = self.config(out, way, teachers, method=method, **changes)
        live = [self.live(way, teacher) for teacher in teachers] if way.codec is None else []
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
        return Run(found, torch.cat(moved))
