"""Checks of a teacher before its answers are recorded: are they repeatable, and are they its own?

Shape letters: B batch, R stored cells, C classes, X classes or channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.errors import CorruptError, SpecMismatchError, UnsupportedError
from cache_service.format.codecs import Floats
from cache_service.format.group import ROOT_KEY
from cache_service.models.weights import one_line
from cache_service.recording.jobs import all_shards
from cache_service.recording.opened import OpenedBuild
from cache_service.rows.reader import Cache, open_cache
from cache_service.rows.writer import refuse_other_spec
from cache_service.storage import open_storage

NUM_PROBES = 64
"""Views that the teacher is asked about twice."""

MAX_SHARDS = 4
"""Recorded shards, spread over the cache, whose witnesses the teacher is asked about again."""

TOLERANCE = {"float32": 2e-3, "float16": 3e-2, "bfloat16": 0.15}
"""By `teacher.precision`: largest difference between two answers to one view in different batches
or on different machines, as a fraction of the range of that view's logits. Kernels sum in another
order, which half precision amplifies. Another network, or statistics of another batch, are off by
a good part of the range."""


class _Recorded(NamedTuple):
    """Some recorded views of one shard, and their stored answers."""

    seed: int
    positions_B: NDArray[np.int64]
    views_BHW3: torch.Tensor
    stored_BRC: Floats
    kept_BRC: NDArray[np.bool_] | None
    """For `topk`: which classes are stored. The others are approximations."""


def check_teacher(build: OpenedBuild) -> None:
    """Refuse a teacher whose answers cannot be recorded into this build's cache.

    Costs a few batches of at most 64 views, and nothing where every shard is committed.

    Raises:
        UnsupportedError: it answers the same views differently from call to call, or by what else
            is in the batch.
        SpecMismatchError: the cache is of another spec, or what is recorded there was answered by
            another teacher.
    """
    storage = open_storage(build.config.cache)
    cache = open_cache(build.config.cache) if storage.get(ROOT_KEY) is not None else None
    if cache is not None:
        refuse_other_spec(cache.url, requested=build.spec, recorded=cache.spec)
        committed = {(seed, n) for seed, shards in cache.commits().items() for n in shards}
        if committed.issuperset(all_shards(build.spec, build.config.seeds)):
            return
    # Compiled code is made once a batch size, for what is recorded; the network is the same.
    compiled = build.config.teacher.compile
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        _require_repeatable(build)
        if cache is not None:
            _require_recorded_teacher(build, cache)


def _require_repeatable(build: OpenedBuild) -> None:
    count, size = min(NUM_PROBES, len(build.dataset)), build.config.batch_size
    positions = np.arange(count, dtype=np.int64)
    views = torch.from_numpy(build.views.render(build.config.seeds[0], positions).pixels_BHW3)
    _answer(build, [views[:1]])  # what a network does on its first run only is done now
    first, second = (_answer(build, torch.split(views, size)) for _ in range(2))
    if not np.array_equal(first, second, equal_nan=True):
        raise UnsupportedError(
            f"teacher {build.config.teacher.model} answered the same {count} views differently "
            f"when asked again (by up to {_largest_difference(first, second):.3g}), so that its "
            "recording could not be resumed or verified.",
            hint="Switch off dropout, sampling and test-time augmentation in its forward, and call "
            "eval() on networks that it keeps in a list.",
        )
    if min(count, size) < 2:
        return
    # In another order, and two views first: few views have other statistics than many.
    backward = torch.flip(views, (0,))
    apart = _answer(build, [backward[:2], *torch.split(backward[2:], size)])[::-1]
    if _fraction_off(build, apart, first).max(initial=0.0) > 1:
        raise UnsupportedError(
            f"teacher {build.config.teacher.model} answers a view by what else is in its batch: "
            f"the same {count} views in other batches differ by up to "
            f"{_largest_difference(first, apart):.3g}.",
            hint="It probably normalizes by batch statistics: call eval() on networks that it "
            "keeps in a list, and do not call train() in its forward.",
        )


def _require_recorded_teacher(build: OpenedBuild, cache: Cache) -> None:
    for recorded in _recorded_views(cache):
        now_BRC = build.teacher.answer(recorded.views_BHW3)
        stored_BRC = recorded.stored_BRC
        if recorded.kept_BRC is not None:
            stored_BRC = np.where(recorded.kept_BRC, stored_BRC, now_BRC)
        off_B = _fraction_off(build, now_BRC, stored_BRC)
        if off_B.max(initial=0.0) <= 1:
            continue
        worst = int(off_B.argmax())
        raise SpecMismatchError(
            f"teacher {build.config.teacher.model} does not answer recorded views of {cache.url} "
            f"as they were recorded: {int((off_B > 1).sum())} of {len(off_B)} differ, that at seed "
            f"{recorded.seed}, position {recorded.positions_B[worst]} by "
            f"{_largest_difference(now_BRC[worst], stored_BRC[worst]):.3g}, although the digest of "
            "its weights is the same. It is another teacher, whose weights are not in "
            "state_dict(), or this machine computes otherwise.",
            hint="Use the teacher and the settings (device, library versions) of the recording, or "
            "give the build another `cache:` path.",
        )


def _recorded_views(cache: Cache) -> list[_Recorded]:
    """Witnesses of a few shards: pixels that the teacher saw, whatever renders views today."""
    shards = [(seed, n) for seed, shards in cache.commits().items() for n in shards]
    spread = np.linspace(0, len(shards) - 1, min(MAX_SHARDS, len(shards))).round().astype(int)
    found = []
    for seed, shard in (shards[index] for index in spread.tolist()):
        positions_B = cache.layout.witness_positions(shard)
        try:
            rows = cache.gather(seed, positions_B)
            views = torch.from_numpy(np.array(cache.witnesses(seed, shard)))
        except CorruptError:  # `verify` finds it; it says nothing of the teacher
            continue
        stored_BRC = cache.spec.decode(rows, head=cache.head())
        kept_BRC = None
        if "classes" in rows:
            kept_BRC = np.zeros(stored_BRC.shape, np.bool_)
            np.put_along_axis(kept_BRC, rows["classes"].astype(np.int64), True, axis=-1)
        found.append(_Recorded(seed, positions_B, views, stored_BRC, kept_BRC))
    return found


def _answer(build: OpenedBuild, batches: Sequence[torch.Tensor]) -> Floats:
    try:
        return np.concatenate([build.answer(batch) for batch in batches if len(batch)])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        raise UnsupportedError(
            f"teacher {build.config.teacher.model} cannot answer views on {build.teacher.device}: "
            f"{one_line(error)}",
            hint="Register every tensor and network that it uses (register_buffer, "
            "nn.ModuleList), so that they are in evaluation mode and on its device.",
        ) from error


def _fraction_off(build: OpenedBuild, now_BRX: Floats, before_BRX: Floats) -> NDArray[np.float64]:
    """Largest difference of each view, in units of what is allowed."""
    now, before = now_BRX.astype(np.float64), before_BRX.astype(np.float64)
    finite_B = np.isfinite(before).all(axis=(1, 2)) & np.isfinite(now).all(axis=(1, 2))
    span_B = before.max(axis=(1, 2)) - before.min(axis=(1, 2))
    largest_B = np.abs(before).max(axis=(1, 2))
    relative = TOLERANCE[build.spec.teacher.precision]
    # float16 storage rounds by 2**-11 of a number; int8 by half a step of 1/255 of a cell's range.
    step = 1 / 255 if build.spec.codec.kind == "int8" else 0.0
    allowed_B = (relative + step) * span_B + 0.1 * relative * largest_B + 2**-10 * largest_B + 1e-6
    off_B = np.abs(now - before).max(axis=(1, 2)) / allowed_B
    return np.where(finite_B, off_B, 0.0)


def _largest_difference(a: Floats, b: Floats) -> float:
    return float(np.nanmax(np.abs(a.astype(np.float64) - b), initial=0.0))
