"""Hugging Face datasets with columns of any names, found by their types."""

from __future__ import annotations

import io
import json
import pickle

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cache_service.datasets import DatasetConfig, open_dataset, wrap_dataset
from cache_service.datasets.dataset import ImageDataset
from cache_service.datasets.mapped import MapSource
from cache_service.datasets.named import _create
from cache_service.errors import DatasetError, UnreadableSampleError

IMAGE = {"_type": "Image"}
LABEL = {"names": ["ant", "bee", "cow"], "_type": "ClassLabel"}
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", tmp_path / "home")
    datasets.disable_progress_bars()


def png(number):
    stream = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), (number, 0, 0)).save(stream, "PNG")
    return {"bytes": stream.getvalue(), "path": f"{number}.png"}


def write(folder, columns, features=None, count=12):
    """A Parquet file as on the hub: `columns` maps each name to its values or to png/label."""
    arrays = {}
    for name, kind in columns.items():
        if kind == "image":
            arrays[name] = pa.array([png(n) for n in range(count)], STRUCT)
        elif kind == "bytes":
            arrays[name] = pa.array([png(n)["bytes"] for n in range(count)])
        elif kind == "label":
            arrays[name] = pa.array([n % 3 for n in range(count)])
        elif kind == "text":
            arrays[name] = pa.array([LABEL["names"][n % 3] for n in range(count)])
        else:
            arrays[name] = pa.array(kind)
    table = pa.table(arrays)
    if features is not None:
        info = {"info": {"features": {name: features[name] for name in columns}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "train.parquet")
    return folder


def opened(folder, tmp_path, **args):
    return open_dataset(
        DatasetConfig(name=f"hfds/{folder}", root=str(tmp_path / "cache"), args=args)
    )


def test_columns_of_any_name_are_found_by_their_types(tmp_path):
    features = {"img": IMAGE, "fine_label": LABEL, "caption": {"dtype": "string", "_type": "Value"}}
    folder = write(
        tmp_path / "hub", {"img": "image", "caption": "text", "fine_label": "label"}, features
    )
    dataset = opened(folder, tmp_path)
    assert dataset.classes == ("ant", "bee", "cow")
    assert dataset.labels.tolist() == [0, 1, 2] * 4
    assert dataset.image(7).getpixel((0, 0)) == (7, 0, 0)
    assert dataset.id.name == "hfds/hub"


def test_the_usual_names_give_the_identity_that_timm_gave(tmp_path):
    folder = write(
        tmp_path / "hub", {"image": "image", "label": "label"}, {"image": IMAGE, "label": LABEL}
    )
    config = DatasetConfig(name=f"hfds/{folder}", root=str(tmp_path / "cache"))
    by_timm = ImageDataset(MapSource(_create(config)), name="hfds/hub", split="train")
    assert open_dataset(config).id == by_timm.id


def test_the_usual_name_is_preferred_among_several(tmp_path):
    columns = {"image": "image", "mask": "image", "coarse": [0, 1] * 6, "label": "label"}
    features = {"image": IMAGE, "mask": IMAGE, "coarse": LABEL, "label": LABEL}
    assert opened(write(tmp_path / "hub", columns, features), tmp_path).labels[2] == 2


def test_several_columns_are_refused_with_their_names_and_the_setting(tmp_path):
    columns = {"img": "image", "fine_label": "label", "coarse_label": [0, 1] * 6}
    features = {"img": IMAGE, "fine_label": LABEL, "coarse_label": LABEL}
    folder = write(tmp_path / "hub", columns, features)
    with pytest.raises(DatasetError, match=r"fine_label \(ClassLabel\), coarse_label") as refusal:
        opened(folder, tmp_path)
    assert "dataset.args.target_key" in refusal.value.hint
    assert opened(folder, tmp_path, target_key="coarse_label").labels[:3].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"target_key": "lable"}, r"names 'lable', but the dataset has no column .*img \(Image\)"),
        ({"input_key": "fine_label"}, r"has no such values in column 'fine_label'"),
        ({"splits": 3}, "cannot be opened"),
    ],
)
def test_wrong_names_are_refused_with_the_columns_that_there_are(tmp_path, args, says):
    folder = write(
        tmp_path / "hub",
        {"img": "image", "fine_label": "label"},
        {"img": IMAGE, "fine_label": LABEL},
    )
    with pytest.raises(DatasetError, match=says) as refusal:
        opened(folder, tmp_path, **args)
    assert "\n" not in str(refusal.value)


def test_files_without_a_schema_of_hugging_face_are_read_by_their_arrow_types(tmp_path):
    dataset = opened(write(tmp_path / "a", {"png": "image", "y": "label"}), tmp_path)
    assert dataset.image(5).getpixel((0, 0)) == (5, 0, 0)
    assert (dataset.classes, dataset.id.num_classes) == ((), 3)
    dataset = opened(write(tmp_path / "b", {"png": "bytes", "kind": "text"}), tmp_path)
    assert dataset.image(5).getpixel((0, 0)) == (5, 0, 0)
    assert dataset.classes == ("ant", "bee", "cow")
    assert dataset.labels[:3].tolist() == [0, 1, 2]


def test_arrays_of_pixels_are_images():
    pixels = np.arange(4 * 6 * 5 * 3, dtype=np.uint8).reshape(4, 6, 5, 3)
    features = datasets.Features(
        {"x": datasets.Array3D((6, 5, 3), "uint8"), "y": datasets.Value("bool")}
    )
    data = datasets.Dataset.from_dict({"x": list(pixels), "y": [True, False] * 2}, features)
    dataset = wrap_dataset(data)
    assert (np.asarray(dataset.image(3)) == pixels[3]).all()
    assert dataset.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"label": "label"}, r"no column of images can be chosen .* are label \(int64\)"),
        ({"image": "image"}, r"no column of labels can be chosen"),
        ({"image": "image", "label": [0, None, 1]}, "sample 1 has no value in column label"),
        ({"image": "image", "label": [0, -1, 1]}, "sample 1 .* has label -1"),
        ({"image": "image", "label": [[0], [1], [0, 1]]}, r"label \(List\)"),
    ],
)
def test_what_is_no_dataset_of_images_and_labels_is_refused(tmp_path, columns, says):
    with pytest.raises(DatasetError, match=says) as refusal:
        opened(write(tmp_path / "hub", columns, count=3), tmp_path)
    assert "\n" not in str(refusal.value)


def test_an_empty_image_is_refused_by_its_number(tmp_path):
    images = pa.array([png(0), None, {"bytes": None, "path": None}], STRUCT)
    folder = write(tmp_path / "hub", {"image": images, "label": [0, 1, 0]})
    with pytest.raises(UnreadableSampleError, match=r"sample 1 .* column image is empty"):
        opened(folder, tmp_path)


def test_a_saved_dataset_and_one_of_its_splits_open(tmp_path):
    data = datasets.Dataset.from_dict({"i": [png(n) for n in range(4)], "y": [0, 1, 0, 1]})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "dev": data}).save_to_disk(tmp_path / "two")
    plain = opened(tmp_path / "one", tmp_path)
    assert plain.image(3).getpixel((0, 0)) == (3, 0, 0)
    assert opened(tmp_path / "two", tmp_path).id.sha256 == plain.id.sha256
    with pytest.raises(DatasetError, match=r"has splits train, dev, not 'val'"):
        open_dataset(DatasetConfig(name=f"hfds/{tmp_path / 'two'}", split="val"))


def test_a_dataset_of_a_users_factory_is_read_by_its_schema_in_every_process():
    data = datasets.Dataset.from_dict({"i": [png(n) for n in range(4)], "y": [0, 1, 0, 1]})
    dataset = pickle.loads(pickle.dumps(wrap_dataset(data.shuffle(seed=1))))
    assert sorted(dataset.image(n).getpixel((0, 0))[0] for n in range(4)) == [0, 1, 2, 3]
    for sample in range(4):
        assert dataset.image(sample).getpixel((0, 0))[0] % 2 == dataset.labels[sample]


def test_several_splits_or_a_stream_are_refused():
    data = datasets.Dataset.from_dict({"i": [png(0)], "y": [0]})
    with pytest.raises(DatasetError, match="cannot be read by sample number"):
        wrap_dataset(data.to_iterable_dataset())


def test_a_moved_dataset_is_the_same_dataset(tmp_path):
    folder = write(tmp_path / "hub", {"image": "image", "label": "label"})
    before = opened(folder, tmp_path).id
    (tmp_path / "elsewhere").mkdir()
    folder.rename(tmp_path / "elsewhere" / "hub")
    assert opened(tmp_path / "elsewhere" / "hub", tmp_path / "other").id == before
