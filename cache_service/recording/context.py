"""Opens the dataset and the teacher of a build file and makes its spec. Writes nothing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from cache_service.config import validate_config
from cache_service.datasets import ImageDataset, open_dataset
from cache_service.format.codecs import BaseCodec, Head
from cache_service.format.group import ROOT_KEY, decode_group
from cache_service.format.layout import CacheLayout, default_layout
from cache_service.format.recipe import AugmentConfig
from cache_service.format.spec import CacheSpec, Layout
from cache_service.recording.build_config import BuildConfig
from cache_service.storage import open_storage
from cache_service.teacher.score import Score, samples_to_score, score_teacher
from cache_service.teacher.teacher import Teacher, load_teacher
from cache_service.views.order import epoch_order
from cache_service.views.replay import Views

SCORED_SAMPLES = 512
"""Number of samples that are scored. It suffices to distinguish a trained teacher from chance for
2 to 21,000 classes, and takes a few seconds for the largest teachers."""


SCORED_FROM = 1 << 18
"""Samples among which SCORED_SAMPLES are chosen: about twelve of each of 21,000 classes. Choosing
sorts them, so their number is bounded."""


@dataclass(frozen=True)
class BuildContext:
    """The opened parts of a build.

    Attributes:
        config: settings of the build file.
        dataset: images and labels.
        teacher: the frozen network.
        spec: identity of the cache.
        views: renders views of the dataset by the recipe.
        notes: what was found while opening, for people.
    """

    config: BuildConfig
    dataset: ImageDataset
    teacher: Teacher
    spec: CacheSpec
    views: Views
    notes: tuple[str, ...] = ()
    _scores: list[Score] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def may_choose_outputs(self) -> bool:
        """Whether the file names more outputs than the dataset has classes, and does not choose."""
        config, classes = self.config.teacher, self.spec.dataset.num_classes
        return (
            config.classes is None
            and self.spec.teacher.num_classes > classes
            and not config.allow_untrained
        )

    @property
    def head(self) -> Head | None:
        """The teacher's linear head if the codec stores features, else None."""
        return self.teacher.head if self.spec.codec.stores_features else None

    @property
    def provenance(self) -> dict[str, Any]:
        """The sections by which `verify --recompute` opens the dataset and the teacher, and what
        tells another decoder from another dataset."""
        teacher = self.config.teacher.model_dump(mode="json")
        if self.teacher.id.classes is not None:
            teacher["classes"] = list(self.teacher.id.classes)  # the file may move
        document = {"dataset": self.config.dataset.model_dump(mode="json"), "teacher": teacher}
        files = self.dataset.files_sha256
        return document if files is None else document | {"files_sha256": files}

    def answer(self, pixels_BHW3: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Compute logits of the stored cells, or features if the codec stores features."""
        if self.spec.codec.stores_features:
            return self.teacher.features(pixels_BHW3)
        return self.teacher.answer(pixels_BHW3)

    def score(self) -> Score:
        """Score the teacher on unaugmented views of randomly chosen samples, once."""
        if not self._scores:
            self._scores.append(self._measure_score())
        return self._scores[0]

    def _measure_score(self) -> Score:
        recipe = AugmentConfig(size=self.spec.recipe.size, preset="none").recipe()
        plain = Views(recipe, self.dataset)
        order_N = epoch_order(len(self.dataset), 0)[:SCORED_FROM]
        chosen = samples_to_score(self.dataset.labels[order_N], SCORED_SAMPLES)
        batch = self.config.batch_size
        batches, labels = [], []
        for start in range(0, len(chosen), batch):
            rendered = plain.render(0, chosen[start : start + batch])
            batches.append(torch.from_numpy(rendered.pixels_BHW3))
            labels.append(self.dataset.labels[rendered.samples_B])
        return score_teacher(
            self.teacher,
            batches,
            np.concatenate(labels),
            names=self.dataset.classes,
            num_classes=self.spec.dataset.num_classes,
        )


def open_build(config: BuildConfig) -> BuildContext:
    """Open the dataset and the teacher of a build file.

    With `teacher.num_classes` above the dataset's number and no `teacher.classes`, the first
    outputs are the dataset's classes. Where they are no better than guessing, and nearly all scored
    views of every class have one other output of its own, those outputs are taken, and a note says
    so.

    Raises:
        DatasetError, ConfigError, UnsupportedError: see the message.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    dataset = open_dataset(config.dataset)
    build = _open(config, dataset)
    if not build.may_choose_outputs:
        return build
    score = build.score()
    outputs = score.other_order.outputs if score.other_order is not None else None
    if outputs is None or score.accuracy >= score.needed:
        return build
    chosen = config.teacher.model_copy(update={"classes": outputs})
    note = (
        f"teacher: outputs {list(outputs)} are taken as the dataset's classes: the first "
        f"{len(outputs)} are right on {score.accuracy:.1%} of {score.num_samples} views, these on "
        f"nearly all of every class. teacher.classes says it without measuring."
    )
    return replace(_open(config.model_copy(update={"teacher": chosen}), dataset), notes=(note,))


def _open(config: BuildConfig, dataset: ImageDataset) -> BuildContext:
    teacher = load_teacher(
        config.teacher,
        scales=config.scales,
        num_classes=dataset.id.num_classes,
        view_size=config.augment.size,
        device=resolve_device(config.device),
        class_names=dataset.classes,
        want_features=config.codec.stores_features,
        store_all=config.codec.drops_classes,
    )
    spec = _spec(config, dataset, teacher)
    return BuildContext(config, dataset, teacher, spec, Views(spec.recipe, dataset))


def resolve_device(device: str) -> str:
    """Return the device for `auto`: the first GPU, or the CPU if there is none."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _spec(config: BuildConfig, dataset: ImageDataset, teacher: Teacher) -> CacheSpec:
    codec: BaseCodec = config.codec
    if teacher.head is not None:
        codec = codec.with_channels(int(teacher.head.weight_CD.shape[1]))
    parts: dict[str, Any] = {
        "dataset": dataset.id,
        "recipe": config.augment.recipe(),
        "teacher": teacher.id,
        "scales": config.scales,
        "stored_scales": teacher.stored_scales,
        "codec": codec,
    }
    # The size of a row does not depend on the layout, so it is computed with any valid layout.
    any_layout = Layout(shard_rows=2, chunk_rows=2)
    draft = validate_config(CacheSpec, {**parts, "layout": any_layout}, where="this build")
    layout = config.layout or _recorded_layout(config.cache)
    layout = layout or default_layout(CacheLayout(draft).row_bytes, len(dataset))
    return draft.model_copy(update={"layout": layout})


def _recorded_layout(url: str) -> Layout | None:
    """The layout of the cache that is there, so that a build goes on in it after the default
    changed; None where there is no cache.

    Raises:
        NotACacheError, CorruptError: something else is there, or a damaged cache.
    """
    content = open_storage(url).get(ROOT_KEY)
    return None if content is None else decode_group(content, url).spec.layout
