"""Joins replayed views to recorded rows and compares each view with its recorded digest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cache_service.datasets import ImageDataset
from cache_service.errors import SpecMismatchError, ViewDriftError
from cache_service.format.codecs import Arrays
from cache_service.format.recipe import Recipe
from cache_service.rows.reader import Cache
from cache_service.views.drift import describe_drift, drift_advice, first_drift, witness_diffs
from cache_service.views.identity import ROUNDING_LEVELS, WitnessDiff, accepts_drift
from cache_service.views.replay import ViewBatch, Views
from distill.batches import Batch, Cursor
from distill.targets import TargetDecoder, tensors_of


class Replay:
    """Joins the views of one recipe to the rows of caches that recorded these views. Picklable.

    Attributes:
        images: the dataset.
        caches: the caches; may be empty.
        views: renders views of the dataset by the recipe.
        array_names: for each cache, the arrays that are needed to decode its rows.

    Raises:
        SpecMismatchError: a cache was recorded with another dataset or recipe.
        ViewDriftError: the files of the dataset are those of the cache, but other pixels are
            decoded from them, and `max_drift` is 0.
    """

    def __init__(
        self,
        images: ImageDataset,
        caches: Sequence[Cache],
        *,
        recipe: Recipe | None = None,
        max_drift: int = 0,
    ) -> None:
        chosen = recipe if recipe is not None else caches[0].spec.recipe
        self.images = images
        self.caches = tuple(caches)
        self.views = Views(chosen, images)
        other_decoder = [
            _refuse_other(cache, self.views, images, max_drift=max_drift) for cache in caches
        ]
        self.array_names = [
            # This decoder is used only for its names, so it needs neither a head nor the device.
            TargetDecoder(cache.spec, None, device="cpu").array_names
            for cache in caches
        ]
        self._guards = [
            ReplayGuard(cache, max_drift=max_drift, other_decoder=other)
            for cache, other in zip(caches, other_decoder, strict=True)
        ]

    def __call__(self, seed: int, positions: NDArray[np.int64]) -> tuple[ViewBatch, list[Arrays]]:
        """Render the views at these positions of a seed and read their rows from each cache.

        Raises:
            SpecMismatchError, ViewDriftError: a view differs from the recorded one.
        """
        with_origins = any(guard.max_drift > 0 for guard in self._guards)
        batch = self.views.render(seed, positions, with_origins=with_origins)
        rows = []
        for cache, guard in zip(self.caches, self._guards, strict=True):
            found = _rows(cache, seed, positions)
            guard.check(self.views, seed, positions, batch, found)
            rows.append(found)
        return batch, rows

    def batch(self, cursor: Cursor, positions: NDArray[np.int64]) -> Batch:
        """Make a batch of the views at these positions and of the arrays that decoding needs."""
        views, rows = self(cursor.seed, positions)
        labels = self.images.labels
        return Batch(
            images_BHW3=torch.from_numpy(views.pixels_BHW3),
            labels_B=torch.from_numpy(labels[views.samples_B]),
            partner_labels_B=torch.from_numpy(labels[views.partners_B]),
            weights_B=torch.from_numpy(views.weights_B),
            samples_B=torch.from_numpy(views.samples_B.astype(np.int64)),
            rows=tuple(
                tensors_of(found, names)
                for found, names in zip(rows, self.array_names, strict=True)
            ),
            cursor=cursor,
        )


def _rows(cache: Cache, seed: int, positions: NDArray[np.int64]) -> Arrays:
    """Read rows. Consecutive positions, the usual case of a loader, are read as one slice."""
    first, last = int(positions[0]), int(positions[-1])
    if last - first + 1 == len(positions) and (np.diff(positions) == 1).all():
        return cache.read(seed, first, last + 1)
    return cache.gather(seed, positions)


def _refuse_other(cache: Cache, views: Views, images: ImageDataset, *, max_drift: int) -> bool:
    """Refuse a dataset or a recipe that is not the recorded one.

    Returns:
        Whether the files are the recorded ones, but are decoded to other pixels. Each shard is then
        compared by its witnesses.
    """
    recorded, recipe = cache.spec.dataset, views.recipe
    if cache.spec.recipe != recipe:
        raise SpecMismatchError(
            f"{cache.url} was recorded with another recipe than the rest of this run: it has "
            f"{cache.spec.recipe.model_dump_json()}, wanted {recipe.model_dump_json()}.",
            hint="Teachers can be combined only over one recipe: they must see the same views.",
        )
    if recorded.sha256 == images.id.sha256:
        return False
    files = cache.group.provenance.get("files_sha256")
    is_same = files is not None and files == images.files_sha256
    if is_same and max_drift and recipe.callable is None:
        return True
    # Caches of earlier versions do not have the checksum; their witnesses tell what is likely.
    may_be_same = files is None and recorded.num_samples == len(images)
    drift = first_drift(cache, views) if is_same or may_be_same else None
    if is_same and drift is not None:
        raise ViewDriftError(
            f"the files of dataset {images.id.name} ({images.id.split}) are those that {cache.url} "
            f"was recorded from, but they are decoded to other pixels here: {drift.description}.",
            hint=drift_advice(drift, recipe),
        )
    likely = (
        f" Recorded views differ by at most {drift.levels} levels, so it is probably the same "
        f"dataset under another decoder, which a cache of this age cannot prove: "
        f"{drift.description}."
        if drift is not None and drift.levels <= ROUNDING_LEVELS
        else ""
    )
    raise SpecMismatchError(
        f"{cache.url} was recorded from dataset {recorded.name} {recorded.split} with "
        f"{recorded.num_samples} samples (sha256 {recorded.sha256[:12]}), but this run has "
        f"{images.id.name} {images.id.split} with {images.id.num_samples} samples (sha256 "
        f"{images.id.sha256[:12]}): images, labels, class order or paths differ.{likely}",
        hint="Install the recorded versions, or record again." if likely else "",
    )


class ReplayGuard:
    """Compares replayed views with the digests that one cache recorded.

    `max_drift` is the largest accepted difference of a witness pixel, in levels of 0 to 255. It
    applies only if source pixels and draws are proven equal. The default, 0, accepts no difference.
    With `other_decoder`, the files of the dataset are proven equal, and the source pixels differ.
    """

    def __init__(self, cache: Cache, *, max_drift: int = 0, other_decoder: bool = False) -> None:
        self._cache = cache
        self._other_decoder = other_decoder
        self.max_drift = max_drift
        self._witness_diffs: dict[tuple[int, int], list[WitnessDiff]] = {}

    def check(
        self, views: Views, seed: int, positions: NDArray[np.int64], batch: ViewBatch, rows: Arrays
    ) -> None:
        """Refuse a batch in which a view differs from the recorded one.

        Raises:
            SpecMismatchError: the recorded order of samples differs from the replayed one.
            ViewDriftError: pixels differ. The message states by how much, and names libraries
                whose versions changed.
        """
        if not np.array_equal(rows["sample"], batch.samples_B):
            first = int(np.flatnonzero(rows["sample"] != batch.samples_B)[0])
            raise SpecMismatchError(
                f"{self._cache.url} has sample {int(rows['sample'][first])} at seed {seed}, "
                f"position {int(positions[first])}; replaying its order gives sample "
                f"{int(batch.samples_B[first])}."
            )
        moved = np.flatnonzero(rows["digest"] != batch.digests_B)
        if not len(moved):
            return
        origins_B = batch.origins_B[moved] if len(batch.origins_B) else None
        if origins_B is None:
            origins_B = views.render(seed, positions[moved]).origins_B
        origins_equal = bool(np.array_equal(rows["origin"][moved], origins_B))
        for shard in np.unique(positions[moved] // self._cache.spec.layout.shard_rows).tolist():
            diffs = self._diffs(views, seed, shard)
            if self._accepts(origins_equal or self._other_decoder, diffs):
                continue
            first = int(moved[0])
            drift = describe_drift(self._cache, views, seed, shard, diffs)
            proven = origins_equal or self._other_decoder
            raise ViewDriftError(
                f"the view of sample {int(batch.samples_B[first])} (seed {seed}, position "
                f"{int(positions[first])}) is not what the teacher saw: "
                f"{self._cause(origins_equal)}; {drift.description}.",
                hint=drift_advice(drift, views.recipe)
                if proven
                else "Train on the dataset that was recorded, or record this one.",
            )

    def _accepts(self, origins_equal: bool, diffs: list[WitnessDiff]) -> bool:
        # The origin does not cover draws inside a user's callable, so they cannot be proven equal.
        if self.max_drift == 0 or self._cache.spec.recipe.callable is not None:
            return False
        return accepts_drift(
            origins_equal=origins_equal, witness_diffs=diffs, max_drift=self.max_drift
        )

    def _diffs(self, views: Views, seed: int, shard: int) -> list[WitnessDiff]:
        """Return the difference of each recorded witness of a shard from its replayed view."""
        known = self._witness_diffs.get((seed, shard))
        if known is None:
            known = witness_diffs(self._cache, views, seed, shard)
            # Only the latest shard is cached: batches are read in order of shards.
            self._witness_diffs = {(seed, shard): known}
        return known

    def _cause(self, origins_equal: bool) -> str:
        if self._other_decoder:
            return "its file is the recorded one, but is decoded to other pixels"
        if origins_equal:
            return "its image and its draws are the recorded ones, so only the rendering changed"
        return "its image or its draws are other ones"
