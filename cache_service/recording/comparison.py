"""Compares a teacher's logits with each other and with recorded logits.

Before a build, `check_teacher` refuses teachers whose logits are not repeatable, and teachers whose
logits for recorded views differ from the recorded ones. `recompute` makes the second comparison for
any number of views, for `verify --recompute`.

Shape letters: B views, R cells, C classes, X classes or channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.errors import (
    CorruptError,
    RowsNotBuiltError,
    SpecMismatchError,
    UnsupportedError,
    ViewDriftError,
)
from cache_service.format.cells import expand_cells
from cache_service.format.codecs import Arrays, Floats
from cache_service.format.group import ROOT_KEY
from cache_service.format.seeds import describe_seeds
from cache_service.format.spec import CacheSpec
from cache_service.human_format import one_line
from cache_service.recording.context import BuildContext
from cache_service.recording.reopen import open_recorded, refuse_other_decoder
from cache_service.recording.shards import all_shards
from cache_service.rows.reader import Cache, open_cache
from cache_service.rows.writer import refuse_other_spec
from cache_service.storage import open_storage
from cache_service.views.identity import compare_views, explain_drift, library_versions
from cache_service.views.replay_probe import require_replayable

NUM_PROBES = 64
"""Number of views that the teacher computes twice before a build."""

MAX_SHARDS = 4
"""Number of recorded shards, evenly spaced, whose witnesses the teacher computes again."""

MIN_AGREEMENT = 0.99
"""Smallest fraction of cells in which teacher and cache must predict the same class. Rounding to
float16 changes a prediction only if two logits differ by less than 0.1 %."""

ALLOWED_ERROR = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.05}
"""Largest root-mean-square difference of two results for the same views, by `teacher.precision`.
The unit is the standard deviation of the logits over the classes of a cell. Sums have another order
in other batches and on other devices, and half precision increases the differences; in float32 they
are below 0.001. The difference of another teacher is near 1."""

FLOAT16_ROUNDING = 2.0**-10
"""Upper bound of the relative difference by rounding to float16 (the exact bound is 2**-11)."""


@dataclass
class RelativeError:
    """Root-mean-square difference of logits beyond rounding to float16.

    The unit is the standard deviation of the logits over the classes of a cell.
    """

    squares: float = 0.0
    variances: float = 0.0

    def add(self, answer_BRX: Floats, reference_BRX: Floats) -> RelativeError:
        """Add the differences between logits and reference logits."""
        rounding_BRX = FLOAT16_ROUNDING * np.abs(reference_BRX)
        beyond_BRX = np.maximum(np.abs(answer_BRX - reference_BRX) - rounding_BRX, 0)
        self.squares += float(np.square(beyond_BRX, dtype=np.float64).sum())
        variances_BR = reference_BRX.var(axis=-1, dtype=np.float64)
        self.variances += float(variances_BR.sum()) * reference_BRX.shape[-1]
        return self

    @property
    def value(self) -> float:
        """The error over all logits added."""
        return float(np.sqrt(self.squares / max(self.variances, 1e-12)))


def allowed_error(spec: CacheSpec) -> float:
    """Return the largest accepted error of stored logits, including the rounding of the codec."""
    return ALLOWED_ERROR[spec.teacher.precision] + spec.codec.rounding_error


# Before a build.


def check_teacher(build: BuildContext) -> None:
    """Refuse a teacher whose logits cannot be recorded into this build's cache.

    The check takes a few batches of at most 64 views. It is skipped if every shard is committed.
    A user's augmentation is tried first, because a teacher answers nothing for views that change.

    Raises:
        UnsupportedError: a view differs when it is rendered again, or the logits of a view change
            from call to call or depend on the other views of the batch.
        SpecMismatchError: the cache has another spec, or was recorded with another teacher.
        ViewDriftError: recorded views of a user's augmentation are not rendered again, or the
            dataset's files are decoded to other pixels.
    """
    storage = open_storage(build.config.cache)
    cache = open_cache(build.config.cache) if storage.get(ROOT_KEY) is not None else None
    if cache is not None:
        refuse_other_decoder(build, cache)
        refuse_other_spec(cache.url, requested=build.spec, recorded=cache.spec)
        committed = {(seed, n) for seed, shards in cache.commits().items() for n in shards}
        if committed.issuperset(all_shards(build.spec, build.config.seeds)):
            return
    require_replayable(build.views, build.config.seeds[0])
    if cache is not None:
        _require_recorded_views(build, cache)
    # torch.compile would compile again for each batch size of the check, so it runs uncompiled.
    compiled = build.config.teacher.compile
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
        _require_repeatable(build)
        if cache is not None:
            _require_recorded_teacher(build, cache)


def _require_repeatable(build: BuildContext) -> None:
    count, size = min(NUM_PROBES, len(build.dataset)), build.config.batch_size
    positions = np.arange(count, dtype=np.int64)
    views = torch.from_numpy(build.views.render(build.config.seeds[0], positions).pixels_BHW3)
    _answer(build, [views[:1]])  # some networks initialize state on their first run
    first, second = (_answer(build, torch.split(views, size)) for _ in range(2))
    if not np.array_equal(first, second, equal_nan=True):
        raise UnsupportedError(
            f"teacher {build.config.teacher.model} answered the same {count} views differently "
            f"when asked again (by up to {np.nanmax(np.abs(first - second)):.3g}), so that its "
            "recording could not be resumed or verified.",
            hint="Switch off dropout, sampling and test-time augmentation in its forward, and call "
            "eval() on networks that it keeps in a list.",
        )
    if min(count, size) < 2 or not np.isfinite(first).all():
        return  # encoding refuses non-finite logits and names the samples
    # Reverse order, and a first batch of two views, whose batch statistics differ strongly.
    backward = torch.flip(views, (0,))
    apart = _answer(build, [backward[:2], *torch.split(backward[2:], size)])[::-1]
    if RelativeError().add(apart, first).value > ALLOWED_ERROR[build.spec.teacher.precision]:
        raise UnsupportedError(
            f"teacher {build.config.teacher.model} answers a view by what else is in its batch: "
            f"the same {count} views in other batches differ by up to "
            f"{np.abs(apart - first).max():.3g}.",
            hint="It probably normalizes by batch statistics: call eval() on networks that it "
            "keeps in a list, and do not call train() in its forward.",
        )


def _spread_shards(cache: Cache) -> list[tuple[int, int]]:
    """A few recorded shards, evenly spaced: (seed, shard)."""
    shards = [(seed, n) for seed, shards in cache.commits().items() for n in shards]
    spread = np.linspace(0, len(shards) - 1, min(MAX_SHARDS, len(shards))).round().astype(int)
    return [shards[index] for index in spread.tolist()]


def _require_recorded_views(build: BuildContext, cache: Cache) -> None:
    """Render the witnesses of a few shards again: a recipe has only the name of a pipeline."""
    recipe = build.spec.recipe
    if recipe.callable is None:
        return
    for seed, shard in _spread_shards(cache):
        try:
            recorded_BHW3 = cache.witnesses(seed, shard)
            versions = cache.commit(seed, shard).versions
        except CorruptError:  # `verify` reports it
            continue
        positions_B = cache.layout.witness_positions(shard)
        now_BHW3 = build.views.render(seed, positions_B).pixels_BHW3
        if np.array_equal(recorded_BHW3, now_BHW3):
            continue
        diffs = [compare_views(*pair) for pair in zip(recorded_BHW3, now_BHW3, strict=True)]
        raise ViewDriftError(
            f"augment.callable {recipe.callable!r} does not render recorded views of {cache.url} "
            f"as they were recorded (shard {shard} of seed {seed}): "
            f"{explain_drift(versions, library_versions(recipe), diffs)}.",
            hint="Use the pipeline and the library versions of the recording, or give the build "
            "another `cache:` path.",
        )


def _require_recorded_teacher(build: BuildContext, cache: Cache) -> None:
    """Compare logits for the witnesses of a few shards, whose pixels the teacher has seen."""
    for seed, shard in _spread_shards(cache):
        positions_B = cache.layout.witness_positions(shard)
        try:
            rows = cache.gather(seed, positions_B)
            views_BHW3 = torch.from_numpy(np.array(cache.witnesses(seed, shard)))
        except CorruptError:  # `verify` reports it; this check is about the teacher
            continue
        stored_BRC, now_BRC = _both_answers(build, cache, rows, views_BHW3)
        error = RelativeError().add(stored_BRC, now_BRC).value
        if error <= allowed_error(cache.spec):
            continue
        raise SpecMismatchError(
            f"teacher {build.config.teacher.model} does not answer recorded views of {cache.url} "
            f"as they were recorded: in shard {shard} of seed {seed} its logits differ by "
            f"{error:.2f} standard deviations ({allowed_error(cache.spec):.2f} are allowed), "
            "although the digest of its weights is the same. It is another teacher, whose weights "
            "are not in state_dict(), or this machine computes otherwise.",
            hint="Use the teacher and the settings (device, library versions) of the recording, or "
            "give the build another `cache:` path.",
        )


def _answer(build: BuildContext, batches: Sequence[torch.Tensor]) -> Floats:
    try:
        return np.concatenate([build.answer(batch) for batch in batches if len(batch)])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, LookupError, TypeError, AssertionError) as error:
        if "view size is not compatible" in str(error) and build.teacher.channels_last:
            raise UnsupportedError(
                f"teacher {build.config.teacher.model} uses Tensor.view, which does not take "
                f"images in the channels-last memory format: {one_line(error)}",
                hint="Set teacher.channels_last: false.",
            ) from error
        raise UnsupportedError(
            f"teacher {build.config.teacher.model} cannot answer views on {build.teacher.device}: "
            f"{one_line(error)}",
            hint="Register every tensor and network that it uses (register_buffer, "
            "nn.ModuleList), so that they are in evaluation mode and on its device.",
        ) from error


def _both_answers(
    build: BuildContext, cache: Cache, rows: Arrays, views_BHW3: torch.Tensor
) -> tuple[Floats, Floats]:
    """Return stored logits and current logits of the teacher, for the classes that are stored."""
    codec = cache.spec.codec
    stored_BRC = cache.spec.decode(rows, head=cache.head())
    now_BRC = build.teacher.answer(views_BHW3)
    return codec.kept_logits(rows, stored_BRC), codec.kept_logits(rows, now_BRC)


# On request.


@dataclass(frozen=True)
class Comparison:
    """Differences between stored logits and the teacher's current logits.

    Attributes:
        num_views: number of views that were compared.
        num_seeds: number of their seeds.
        num_shards: number of their shards.
        views_equal: number of views whose pixels were reproduced exactly.
        max_abs_diff: largest absolute difference of a logit.
        top1_agreement: fraction of cells with the same predicted class.
        relative_error: error of each seed; see `ALLOWED_ERROR`.
        allowed_error: largest accepted error.
    """

    num_views: int
    num_seeds: int
    num_shards: int
    views_equal: int
    max_abs_diff: float
    top1_agreement: float
    relative_error: dict[int, float]
    allowed_error: float

    @property
    def other_seeds(self) -> list[int]:
        """Seeds whose stored logits differ from those of this teacher, ascending."""
        return [s for s, error in self.relative_error.items() if not error <= self.allowed_error]

    @property
    def accepted(self) -> bool:
        """Whether all views are reproduced and all seeds have the logits of this teacher."""
        replayed = self.views_equal == self.num_views
        return replayed and self.top1_agreement >= MIN_AGREEMENT and not self.other_seeds

    def lines(self) -> list[str]:
        """Return a description of the result, with one sentence per line."""
        counts = f"{self.num_views} views of {self.num_shards} shards and {self.num_seeds} seeds"
        lines = [
            (
                f"recomputed {counts}: {self.views_equal} replay exactly, largest difference "
                f"{self.max_abs_diff:.4f}, same class in {self.top1_agreement:.2%} of cells"
            )
        ]
        if self.other_seeds:
            lines.append(
                f"refused: the stored logits of seeds {describe_seeds(self.other_seeds)} are not "
                "those that the teacher computes now (relative error "
                f"{max(self.relative_error.values()):.2f}, allowed {self.allowed_error:.2f})"
            )
        return lines


def recompute(
    cache: Cache, num_views: int, *, device: str = "auto", settings: Sequence[str] = ()
) -> Comparison:
    """Compare the teacher's logits for `num_views` views, spread over all seeds and shards.

    Args:
        cache: the recording.
        num_views: number of views.
        device: of the teacher.
        settings: changes to the stored sections, see `open_recorded`.

    Raises:
        SpecMismatchError: the dataset or the teacher differs from that of the recording.
        ViewDriftError: the dataset's files are decoded to other pixels than at the recording.
        RowsNotBuiltError: no shard is recorded.
    """
    chosen = spread_views(cache.spec, cache.commits(), num_views)
    if not chosen:
        raise RowsNotBuiltError(f"no shard of {cache.url} is recorded.")
    build = open_recorded(cache, device=device, settings=settings)
    scales, stored_scales = cache.spec.scales, cache.spec.stored_scales
    total, equal, worst = 0, 0, 0.0
    agreements: list[NDArray[np.bool_]] = []
    errors: dict[int, float] = {}
    shards: set[tuple[int, int]] = set()
    for seed, positions in chosen.items():
        error = RelativeError()
        for start in range(0, len(positions), build.config.batch_size):
            batch = positions[start : start + build.config.batch_size]
            views = build.views.render(seed, batch)
            rows = cache.gather(seed, batch)
            stored, now = (
                expand_cells(answer, scales, stored_scales)
                for answer in _both_answers(build, cache, rows, torch.from_numpy(views.pixels_BHW3))
            )
            total += len(batch)
            equal += int((rows["digest"] == views.digests_B).sum())
            shards |= {(seed, shard) for shard in (batch // cache.spec.layout.shard_rows).tolist()}
            agreements.append((stored.argmax(-1) == now.argmax(-1)).ravel())
            worst = max(worst, float(np.abs(stored - now).max()))
            error.add(stored, now)
        errors[seed] = error.value
    return Comparison(
        total,
        len(chosen),
        len(shards),
        equal,
        worst,
        float(np.concatenate(agreements).mean()),
        errors,
        allowed_error(cache.spec),
    )


def spread_views(
    spec: CacheSpec, commits: Mapping[int, Sequence[int]], num_views: int
) -> dict[int, NDArray[np.int64]]:
    """Choose `num_views` positions to compare, or all if fewer are recorded; ascending, by seed.

    Views are divided evenly among the seeds and evenly spaced over the recorded shards of each
    seed. The first position differs between seeds, so that few views of many seeds still cover all
    parts of the epoch.

    Args:
        spec: spec of the cache.
        commits: recorded shards by seed.
        num_views: number of views to compare.
    """
    recorded = {
        seed: np.concatenate([np.arange(*spec.shard_range(shard)) for shard in shards])
        for seed, shards in commits.items()
    }
    chosen = {}
    left = num_views
    # Seeds with the fewest rows first, so that the others can provide the views that they lack.
    by_size = sorted(recorded, key=lambda seed: (len(recorded[seed]), seed))
    counts = {}
    for done, seed in enumerate(by_size):
        counts[seed] = min(len(recorded[seed]), left // (len(by_size) - done))
        left -= counts[seed]
    for number, seed in enumerate(recorded):
        if counts[seed]:
            places = np.arange(counts[seed]) + (number + 0.5) / len(recorded)
            places = (places * len(recorded[seed]) / counts[seed]).astype(np.int64)
            chosen[seed] = recorded[seed][places]
    return chosen
