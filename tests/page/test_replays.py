"""Which dataset may be opened for a cache, and which view is shown: never what the cache likes."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from support.builds import record_toy
from support.caches import make_spec
from support.toys import patches

from cache_service.api.page.explorer import (
    checked_replay,
    explore,
    image_request,
    matching_datasets,
)
from cache_service.api.page.image_worker import ImageWorker
from cache_service.format.group import Group
from cache_service.format.spec import CacheSpec
from cache_service.rows.reader import open_cache

TOYS = {"name": "support.toys:patches", "root": None, "split": "train", "args": {"num_samples": 96}}


def group(**provenance):
    spec = make_spec()
    spec = spec.model_copy(
        update={"dataset": spec.dataset.model_copy(update={"name": "torch/cifar100"})}
    )
    return Group(spec, {}, provenance, {})


def configured(name="torch/cifar100", root="/data", split="train", **args):
    return {"name": name, "root": root, "split": split, "args": args}


def test_only_configured_datasets_are_opened_whatever_a_cache_says():
    evil = {"name": "os:system", "root": "/etc", "args": {"command": "true"}}
    assert matching_datasets(group(dataset=evil), []) == []
    assert matching_datasets(group(dataset=evil), [configured("digits", None)]) == []
    assert matching_datasets(group(dataset=evil), [configured()]) == [configured()]


@pytest.mark.parametrize("dataset", [None, 7, "x", [], {"split": 3}, {"name": {}}])
def test_a_strange_provenance_is_no_dataset(dataset):
    assert matching_datasets(group(dataset=dataset), [configured()]) == [configured()]
    assert matching_datasets(group(), [configured()]) == [configured()]


def test_the_recorded_place_comes_first_of_those_that_fit():
    here, there = configured(root="/here"), configured(root="/there")
    recorded = {"name": "torch/cifar100", "root": "/there"}
    assert matching_datasets(group(dataset=recorded), [here, there]) == [there, here]
    assert matching_datasets(group(), [configured(split="test")]) == []


def rendered(**changes):
    facts = {
        "image": "data:image/png;base64,AAAA",
        "digest": 5,
        "origin": 6,
        "sample": 1,
        "partner": 1,
        "partner_label": 4,
        "weight": 1.0,
    }
    return facts | changes


def test_a_view_is_shown_only_where_its_digest_is_the_recorded_one():
    same = checked_replay(rendered(), label=2, digest=5, origin=6)
    assert same.image == "data:image/png;base64,AAAA"
    assert (same.drift, same.label, same.partner) == ("", 2, None)
    library = checked_replay(rendered(), label=2, digest=9, origin=6)
    other = checked_replay(rendered(), label=2, digest=9, origin=7)
    assert (library.image, other.image) == ("", "")
    assert "libraries render other pixels" in library.drift
    assert "not those recorded" in other.drift


@pytest.mark.parametrize(("weight", "label"), [(0.7, 2), (0.5, 2), (0.3, 4)])
def test_a_mixed_view_has_the_label_of_its_larger_part(weight, label):
    found = checked_replay(rendered(partner=9, weight=weight), label=2, digest=5, origin=6)
    assert (found.label, found.partner) == (label, 9)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    return record_toy(str(tmp_path_factory.mktemp("images") / "c"), seeds="0:1")


def request_for(cache, **changes):
    position = int((cache.read(0, 0, 96)["sample"] == 7).nonzero()[0][0])
    views = [(0, position), (3, 0)]
    made = image_request(cache.spec, [TOYS], sample=7, views=views, names=[0, 1, 99])
    return made | changes


def test_the_worker_renders_the_recorded_pixels(recorded):
    request = request_for(recorded)
    images = ImageWorker().render(request)
    row = recorded.gather(0, np.array([request["views"][0][1]]))
    assert images["views"][0]["digest"] == int(row["digest"][0])
    assert images["views"][0]["origin"] == int(row["origin"][0])
    assert images["label"] == patches(num_samples=96).targets[7]
    assert images["names"] == {"0": "place0", "1": "place1", "2": "place2"} | {
        str(view["partner_label"]): f"place{view['partner_label']}" for view in images["views"]
    }
    assert images["size"] == [16, 16]


def test_the_worker_refuses_a_dataset_with_another_identity(recorded):
    other = TOYS | {"args": {"num_samples": 96, "salt": 1}}
    refusal = ImageWorker().answer(request_for(recorded, datasets=[other]))["error"]
    assert refusal["code"] == "dataset"
    assert "digest" in refusal["detail"]
    assert "configuration" in refusal["hint"]


def test_the_worker_keeps_the_dataset_open(recorded):
    worker = ImageWorker()
    first = worker.answer(request_for(recorded))
    (dataset,) = worker._datasets.values()
    assert worker.answer(request_for(recorded)) == first
    assert list(worker._datasets.values()) == [dataset]


def test_a_missing_library_is_an_error_that_says_what_to_install(recorded, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    refusal = ImageWorker().answer(request_for(recorded))["error"]
    assert "library that is not installed" in refusal["detail"]
    assert "pip install 'kd-cache[train]'" in refusal["hint"]


def test_code_that_a_cache_names_as_its_recipe_is_not_run(root):
    cache = open_cache(str(root / "plain"))
    spec = cache.spec.model_dump(mode="json")
    spec["recipe"] |= {"ops": [], "callable": "os:abort"}
    cache.spec = CacheSpec.model_validate(spec)
    found = explore(cache, 0, 0, commits=cache.commits(), datasets=[TOYS], renderer=None, wait_s=0)
    assert "does not run" in found.note.text
    assert found.replay is None
