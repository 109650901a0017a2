"""Which dataset may be opened for a cache, and which view is shown: never what the cache likes."""

from __future__ import annotations

import sys

import numpy as np
import PIL.Image
import pytest
from support.builds import record_toy
from support.caches import make_spec
from support.serving import READ_TOKEN, TOKENS, serving
from support.toys import patches

from cache_service.api.page.explorer import ImageAccess, explore
from cache_service.api.page.image_worker import ImageWorker
from cache_service.api.page.replays import checked_replay, image_request, openable_datasets
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


def openable(group, listed=(), *, is_private=True):
    return openable_datasets(group, listed, is_private=is_private)


RUNS_CODE = {"name": "os:system", "root": "/etc", "args": {"command": "true"}}


def test_a_listed_dataset_is_opened_whatever_a_cache_says():
    assert openable(group(dataset=RUNS_CODE), [configured()]).datasets == [configured()]
    assert openable(group(dataset=RUNS_CODE), [configured("digits", None)]).datasets == []


@pytest.mark.parametrize("dataset", [None, 7, "x", [], {"split": 3}, {"name": {}}])
def test_a_strange_provenance_is_no_dataset(dataset):
    assert openable(group(dataset=dataset), [configured()]).datasets == [configured()]
    assert openable(group(dataset=dataset)).datasets == []
    assert openable(group()).reason


def test_the_recorded_place_comes_first_of_those_that_fit():
    here, there = configured(root="/here"), configured(root="/there")
    recorded = {"name": "torch/cifar100", "root": "/there"}
    assert openable(group(dataset=recorded), [here, there]).datasets == [there, here]
    assert openable(group(), [configured(split="test")]).datasets == []


@pytest.mark.parametrize("name", ["folder", "torch/cifar100", "torch/mnist"])
def test_a_dataset_of_files_that_a_cache_names_is_opened_where_only_this_machine_sees_it(
    name, tmp_path
):
    section = configured(name, str(tmp_path))
    assert openable(group(dataset=section)).datasets == [section]
    public = openable(group(dataset=section), is_private=False)
    assert public.datasets == []
    assert "the server has tokens" in public.reason
    listed = openable(group(dataset=section), [configured()], is_private=False)
    assert listed.datasets == [configured()]


def test_digits_need_nothing():
    for is_private in (True, False):
        section = configured("digits", None)
        found = openable(group(dataset=section), is_private=is_private)
        assert (found.datasets, found.reason) == ([section], "")


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (RUNS_CODE, "arguments"),
        (configured("support.toys:patches", None), "could run code"),
        (configured("file.py:make", "/"), "could run code"),
        (configured("hfds/mnist", None), "use the network"),
        (configured("hfids/mnist", "/"), "use the network"),
        (configured("torch/imagenet", "/"), "could run code"),
        (configured("Folder", "/"), "could run code"),
        (configured("torch/cifar100", "/", download=True), "arguments"),
        (configured("digits", "/"), "with a folder"),
        (configured("digits", None, a=1), "arguments"),
        (configured("folder", None), "not on this machine"),
        (configured("folder", "/does/not/exist"), "not on this machine"),
        (configured("folder", "$HOME"), "not on this machine"),
        (configured("folder", "~"), "not on this machine"),
        (configured("folder", 7), "not on this machine"),
        (configured("folder", ["/"]), "not on this machine"),
        (configured("folder", __file__), "not on this machine"),
    ],
)
def test_a_dataset_that_is_not_safe_is_not_opened_and_the_reason_is_said(section, says):
    found = openable(group(dataset=section))
    assert found.datasets == []
    assert says in found.reason


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
    question = {"sample": 7, "views": views, "names": [0, 1, 99]}
    made = image_request(cache.spec, [TOYS], "sample", question)
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
    assert "in the serve file" in refusal["hint"]


@pytest.mark.parametrize(
    "section", [{"name": "folder", "surprise": 1}, {"name": 7}, {"name": "folder", "root": "/no"}]
)
def test_the_worker_passes_over_a_dataset_that_cannot_be_opened(recorded, section):
    worker = ImageWorker()
    assert worker.answer(request_for(recorded, datasets=[section, TOYS]))["label"] == 2
    refusal = worker.answer(request_for(recorded, datasets=[section]))["error"]
    assert refusal["code"] in ("config", "dataset")


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
    access = ImageAccess([TOYS], is_private=True, renderer=None, wait_s=0)
    found = explore(cache, 0, 0, commits=cache.commits(), access=access)
    assert "does not run" in found.note.text
    assert found.replay is None


def test_a_plain_server_shows_the_images_of_its_caches(tmp_path):
    """As `kd-cache serve caches` without a serve file: digits, and a folder of images."""
    images = tmp_path / "images"
    for label in ("cat", "dog"):
        (images / label).mkdir(parents=True)
        for number in range(2):
            picture = np.full((16, 16, 3), 60 * number + len(label) * 20, np.uint8)
            PIL.Image.fromarray(picture).save(images / label / f"{number}.png")
    folder = {"name": "folder", "root": str(images)}
    small = {"seeds": "0:1", "layout": {"shard_rows": 512, "chunk_rows": 64}}
    augment = {"preset": "none", "size": 16}
    for name, dataset, classes in (("folder", folder, 2), ("digits", {"name": "digits"}, 10)):
        teacher = {"model": f"support.toys:net_of_{classes}", "allow_untrained": True}
        record_toy(
            str(tmp_path / "caches" / name),
            dataset=dataset,
            teacher=teacher,
            augment=augment,
            **small,
        )
    with serving(tmp_path / "caches") as service:
        for name, label in (("digits", "0"), ("folder", "cat")):
            page = service.ask("GET", f"/caches/{name}/explore?seed=0&sample=0")
            for _ in range(20):
                if "refresh" not in page.headers:
                    break
                page = service.ask("GET", f"/caches/{name}/explore?seed=0&sample=0")
            html = page.data.decode()
            assert html.count("data:image/png;base64,") >= 2, name
            assert "equal</span> to the recorded digest" in html
            assert f"<dt>Label</dt><dd>{label}</dd>" in html
    listed = {"names": {"name": "folder", "root": str(images)}}
    with serving(tmp_path / "caches", tokens=TOKENS, datasets=listed) as service:
        page = service.ask("GET", "/caches/folder/explore", token=READ_TOKEN)
        assert "does not open the dataset" not in page.data.decode()
    with serving(tmp_path / "caches", tokens=TOKENS) as service:
        page = service.ask("GET", "/caches/folder/explore", token=READ_TOKEN)
        assert "does not open the dataset" in page.data.decode()
