"""Rendering a build's views ahead of the teacher."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from cache_service.loading import load_ahead
from cache_service.recording.jobs import Job
from cache_service.views.replay import ViewBatch, Views


class Rendered(NamedTuple):
    """The views of one job. `pixels` is a tensor because those travel through shared memory."""

    job: Job
    pixels_BHW3: torch.Tensor
    views: ViewBatch


class _Render:
    def __init__(self, views: Views) -> None:
        self._views = views

    def __call__(self, job: Job) -> Rendered:
        batch = self._views.render(job.seed, np.arange(job.start, job.stop, dtype=np.int64))
        pixels = torch.from_numpy(batch.pixels_BHW3)
        # The array inside the views would travel a second time, by pickle.
        return Rendered(job, pixels, batch._replace(pixels_BHW3=batch.pixels_BHW3[:0]))


def rendered(views: Views, jobs: Iterable[Job], *, workers: int) -> Iterator[Rendered]:
    """The jobs' views in the jobs' order. `jobs` may be endless: only a few are taken ahead."""
    return load_ahead(_Render(views), jobs, workers=workers)
