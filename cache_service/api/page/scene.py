"""What the drawing process is asked for, and what may be believed of its answer. Pure.

A recorded view is only shown where the replayed pixels have the recorded digest: another crop under
the teacher's answers would be a picture of something that it never saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cache_service.format.group import Group
from cache_service.format.spec import CacheSpec

_DEFAULTS: dict[str, Any] = {"root": None, "split": "train", "args": {}}
"""Of `dataset:` sections, so that equal ones compare equal however they were written."""


class Drawn(NamedTuple):
    """A view as the drawing process replayed it.

    Attributes:
        picture: address of the image; empty where the digest says that it is another view.
        drift: why it is not shown; empty where it is.
        label: the sample's class, of a mixed view that of its larger part.
        partner: the sample mixed in; None where the view is not mixed.
        weight: share of the own label.
    """

    picture: str
    drift: str
    label: int
    partner: int | None
    partner_label: int
    weight: float


def fitting_datasets(group: Group, configured: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Those of the configured datasets that may be the one a cache was recorded of, best first.

    A cache's own word for its dataset only chooses among them. It is never opened itself: it may
    name any folder or any module of this machine.
    """
    recorded = _normal(_as_mapping(group.provenance.get("dataset")))
    spec = group.spec.dataset
    # What the spec calls a factory is not always what a file calls it.
    wanted = ((spec.name, spec.split), (recorded.get("name"), recorded["split"]))
    found = [_normal(each) for each in configured]
    fitting = [each for each in found if (each.get("name"), each["split"]) in wanted]
    return sorted(fitting, key=lambda each: each != recorded)


def scene_request(
    spec: CacheSpec,
    datasets: Sequence[Mapping[str, Any]],
    *,
    sample: int,
    views: Sequence[tuple[int, int]],
    names: Sequence[int],
) -> dict[str, Any]:
    """The request for a sample and its views at (seed, position) pairs; see `render_worker`."""
    return {
        "datasets": list(datasets),
        "dataset": spec.dataset.model_dump(mode="json"),
        "recipe": spec.recipe.model_dump(mode="json"),
        "sample": sample,
        "views": [list(pair) for pair in views],
        "names": sorted(set(names)),
    }


def judge(drawn: Mapping[str, Any], *, label: int, digest: int, origin: int) -> Drawn:
    """Compare a replayed view with what was recorded.

    Args:
        drawn: one entry of a scene's `views`.
        label: of the sample.
        digest, origin: recorded ones of the view's row.
    """
    mixed = drawn["partner"] != drawn["sample"]
    own = drawn["weight"] >= 0.5
    same = drawn["digest"] == digest
    drift = (
        "its images and draws are those recorded, but the installed libraries render other pixels"
        if drawn["origin"] == origin
        else "its image or its draws are not those recorded"
    )
    return Drawn(
        picture=f"data:image/png;base64,{drawn['png']}" if same else "",
        drift="" if same else drift,
        label=label if own else drawn["partner_label"],
        partner=drawn["partner"] if mixed else None,
        partner_label=drawn["partner_label"],
        weight=drawn["weight"],
    )


def _normal(section: Mapping[str, Any]) -> dict[str, Any]:
    return _DEFAULTS | dict(section)


def _as_mapping(found: Any) -> Mapping[str, Any]:
    return found if isinstance(found, Mapping) else {}
