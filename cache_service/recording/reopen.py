"""Opens the dataset and the teacher that a cache was recorded with, also after they were moved."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from cache_service.config import Frozen, override_document, validate_config
from cache_service.datasets import DatasetConfig
from cache_service.errors import ConfigError, DatasetError, SpecMismatchError, ViewDriftError
from cache_service.format.spec import DatasetId
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import BuildContext, open_build
from cache_service.rows.reader import Cache
from cache_service.teacher.settings import TeacherConfig
from cache_service.views.drift import first_drift

MOVED = (
    "If it was moved, name its new place: --set dataset.root=... or --set teacher.checkpoint=..."
)

SECTIONS: dict[str, type[Frozen]] = {"dataset": DatasetConfig, "teacher": TeacherConfig}
"""The sections of a build file that a cache stores, and that may be changed on reopening."""


def open_recorded(
    cache: Cache, *, device: str = "auto", settings: Sequence[str] = ()
) -> BuildContext:
    """Open the dataset and the teacher of a cache by its provenance.

    Args:
        cache: the recording. Relative paths in its provenance are relative to the current folder.
        device: of the teacher.
        settings: `dataset.KEY=VALUE` or `teacher.KEY=VALUE` each, such as the place of a dataset
            that was moved.

    Raises:
        ConfigError, DatasetError: a setting is no such key, or dataset or teacher cannot be opened.
        SpecMismatchError: what opens is another dataset or teacher.
        ViewDriftError: it is the same dataset, but its files are decoded to other pixels.
    """
    provenance = cache.group.provenance
    if not SECTIONS.keys() <= provenance.keys():
        raise ConfigError(f"{cache.url} does not say how to open its dataset and teacher.")
    spec = cache.spec
    recipe = spec.recipe.model_dump(mode="json")
    views = "callable" if recipe["callable"] is not None else "ops"
    config = BuildConfig.model_validate(
        {
            "cache": cache.url,
            **_changed(provenance, settings),
            "augment": {"size": recipe["size"], views: recipe[views]},
            "scales": spec.scales,
            "codec": spec.codec,
            "layout": spec.layout,
            "seeds": 0,
            "device": device,
        }
    )
    try:
        build = open_build(config)
    except (ConfigError, DatasetError) as refusal:
        raise type(refusal)(refusal.message, hint=f"{refusal.hint} {MOVED}".strip()) from refusal
    refuse_other_decoder(build, cache)
    for field in SECTIONS:
        opened, recorded = getattr(build.spec, field), getattr(spec, field)
        if opened != recorded:
            raise SpecMismatchError(
                f"the {field} that opens now is not the one that {cache.url} was recorded with: "
                f"{opened.model_dump_json()} against {recorded.model_dump_json()}.",
                hint=MOVED,
            )
    return build


def refuse_other_decoder(build: BuildContext, cache: Cache) -> None:
    """Refuse a dataset whose files are the recorded ones, but are decoded to other pixels here.

    Raises:
        ViewDriftError: names the libraries that changed, and the size of the difference.
    """
    opened, recorded = build.dataset.id, cache.spec.dataset
    if opened == recorded or _without_pixels(opened) != _without_pixels(recorded):
        return
    files = cache.group.provenance.get("files_sha256")
    if files is None or files != build.dataset.files_sha256:
        return
    drift = first_drift(cache, build.views)
    raise ViewDriftError(
        f"the files of dataset {opened.name} ({opened.split}) are those that {cache.url} was "
        "recorded from, but they are decoded to other pixels here"
        + (f": {drift.description}." if drift else "."),
        hint="Install the recorded versions, or give the build another `cache:` path.",
    )


def _without_pixels(dataset: DatasetId) -> DatasetId:
    return dataset.model_copy(update={"sha256": ""})


def _changed(provenance: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The stored sections with the user's settings, in which `~` and `$NAME` are expanded."""
    document = {name: deepcopy(provenance[name]) for name in SECTIONS}
    for setting in settings:
        section = setting.partition("=")[0].strip().partition(".")[0]
        if section not in SECTIONS:
            raise ConfigError(
                f"--set {setting!r}: a cache is opened again by its dataset and its teacher only.",
                hint="Write --set dataset.root=..., --set teacher.checkpoint=..., or another key "
                "of these sections.",
            )
        override_document(document, [setting])
        validated = validate_config(SECTIONS[section], document[section], where="--set")
        document[section] = validated.model_dump(mode="json")
    return document
