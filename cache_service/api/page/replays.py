"""Which dataset may be opened for a cache, and what is shown of the images rendered from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache_service.format.group import Group
from cache_service.format.spec import CacheSpec


class Replay(NamedTuple):
    """A view as the image worker rendered it again.

    Attributes:
        image: address of the image; empty if its digest says that it is another view.
        drift: why it is not shown; empty if it is.
        label: the sample's class, of a mixed view that of its larger part.
        partner: the sample mixed in; None if the view is not mixed.
        weight: weight of the sample's own label.
    """

    image: str
    drift: str
    label: int
    partner: int | None
    partner_label: int
    weight: float


CHECKED_FILES = tuple(
    f"torch/{name}"
    for name in ("cifar10", "cifar100", "mnist", "fashion_mnist", "kmnist", "qmnist")
)
"""torchvision's datasets that only read files below their root. CIFAR's files are pickles, and
torchvision compares their MD5 with the published ones before it loads them."""


class Openable(NamedTuple):
    """The datasets that may be opened for a cache.

    Attributes:
        datasets: sections `dataset`, the likeliest first.
        reason: why the dataset that the cache itself names is not among them; empty if it is, or if
            others are.
    """

    datasets: list[dict[str, Any]]
    reason: str


def openable_datasets(
    group: Group, listed: Sequence[Mapping[str, Any]], *, is_private: bool
) -> Openable:
    """The datasets that may be opened for a cache: listed ones, and one that it names if safe.

    Whatever is opened, its images are shown only if its identity (labels, names, pixels of 64
    samples) is the recorded one; see docs/decisions/022.

    Args:
        group: root document of the cache.
        listed: by the operator, in the serve file.
        is_private: whether only this machine reaches the server.
    """
    recorded = _with_defaults(group.provenance.get("dataset"))
    spec = group.spec.dataset
    # A factory may have another name in the spec than in a configuration file.
    names = ((spec.name, spec.split), (recorded.get("name"), recorded["split"]))
    datasets = [_with_defaults(section) for section in listed]
    matching = [each for each in datasets if (each.get("name"), each["split"]) in names]
    matching.sort(key=lambda each: each != recorded)
    reason = _reason_not_to_open(recorded, is_private=is_private)
    if not reason and recorded not in matching:
        matching.append(recorded)
    return Openable(matching, "" if matching else reason)


def _reason_not_to_open(recorded: Mapping[str, Any], *, is_private: bool) -> str:
    """Why a dataset is not opened that nobody but the cache names; empty if it may be opened."""
    name, root = recorded.get("name"), recorded["root"]
    needs_root = name == "folder" or name in CHECKED_FILES
    if recorded["args"]:
        return "the cache names it with arguments, which could start a download or run code"
    if not needs_root and name != "digits":
        return "opening it could run code or use the network, and a cache alone must not start that"
    if not needs_root:
        return "" if root is None else "the cache names it with a folder, which it does not have"
    if not is_private:
        return "the server has tokens, so others than its operator see the pages"
    if not isinstance(root, str) or "$" in root or "~" in root or not Path(root).is_dir():
        return "the folder that the cache names is not on this machine"
    return ""


def _with_defaults(section: Any) -> dict[str, Any]:
    """A `dataset:` section such that equal ones compare equal, however they were written."""
    defaults: dict[str, Any] = {"root": None, "split": "train", "args": {}}
    return defaults | (dict(section) if isinstance(section, Mapping) else {})


def image_request(
    spec: CacheSpec,
    datasets: Sequence[Mapping[str, Any]],
    kind: str,
    question: Mapping[str, Any],
) -> dict[str, Any]:
    """A request to the image process about the dataset of a cache; see `image_worker`."""
    return {
        "kind": kind,
        "datasets": list(datasets),
        "dataset": spec.dataset.model_dump(mode="json"),
        "recipe": spec.recipe.model_dump(mode="json"),
        **question,
    }


def checked_replay(view: Mapping[str, Any], *, label: int, digest: int, origin: int) -> Replay:
    """Compare a rendered view with what was recorded.

    A view is shown only if its pixels have the recorded digest. Any other pixels under the
    teacher's predictions would be a picture that the teacher never saw.

    Args:
        view: one entry of the `views` of an image worker's answer.
        label: of the sample.
        digest, origin: recorded ones of the view's row.
    """
    same = view["digest"] == digest
    drift = (
        "its images and draws are those recorded, but the installed libraries render other pixels"
        if view["origin"] == origin
        else "its image or its draws are not those recorded"
    )
    return Replay(
        image=view["image"] if same else "",
        drift="" if same else drift,
        label=label if view["weight"] >= 0.5 else view["partner_label"],
        partner=view["partner"] if view["partner"] != view["sample"] else None,
        partner_label=view["partner_label"],
        weight=view["weight"],
    )


def redact(text: str, datasets: Sequence[Mapping[str, Any]]) -> str:
    """Remove the roots of datasets: only the operator may know them."""
    for dataset in datasets:
        if dataset["root"]:
            text = text.replace(str(dataset["root"]), "...")
    return text
