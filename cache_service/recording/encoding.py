"""The teacher's answer to one batch becomes rows, and a shard's batches become the shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import NonFiniteError
from cache_service.format.codecs import Arrays, Floats
from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec
from cache_service.recording.opened import OpenedBuild
from cache_service.recording.render import Rendered


class EncodedBatch(NamedTuple):
    """The rows of one job, and by position the views that are kept as witnesses."""

    rows: Arrays
    witnesses: dict[int, NDArray[np.uint8]]


def encode_batch(build: OpenedBuild, batch: Rendered, answer_BRX: Floats) -> EncodedBatch:
    """Encode one batch of answers.

    Raises:
        NonFiniteError: the codec cannot hold an answer; names seed, positions and samples.
    """
    job, views, labels = batch.job, batch.views, build.dataset.labels
    kept_B2 = np.stack([labels[views.samples_B], labels[views.partners_B]], axis=1)
    try:
        encoded = build.spec.codec.encode(answer_BRX, kept_B2)
    except NonFiniteError as problem:
        raise NonFiniteError(
            f"{problem.message} They are of the batch at seed {job.seed}, positions "
            f"[{job.start}, {job.stop}), samples {views.samples_B[:8].tolist()} and on.",
            hint="Try teacher.precision: float32, and check the checkpoint.",
        ) from problem
    common: Arrays = {
        "sample": views.samples_B.astype(np.int32),
        "digest": views.digests_B,
        "origin": views.origins_B,
    }
    wanted = CacheLayout(build.spec).witness_positions(job.shard)
    here = wanted[(wanted >= job.start) & (wanted < job.stop)].tolist()
    pixels = batch.pixels_BHW3.numpy()
    return EncodedBatch(common | encoded, {p: pixels[p - job.start].copy() for p in here})


def join_batches(
    spec: CacheSpec, shard: int, batches: Sequence[EncodedBatch]
) -> tuple[Arrays, NDArray[np.uint8]]:
    """Every row array of a shard, and its witnesses, uint8 [W, H, W, 3]."""
    names = batches[0].rows
    rows = {name: np.concatenate([batch.rows[name] for batch in batches]) for name in names}
    kept = {position: view for batch in batches for position, view in batch.witnesses.items()}
    return rows, np.stack([kept[p] for p in CacheLayout(spec).witness_positions(shard).tolist()])
