"""MNIST's files: read, with classes left out, or refused in one line."""

from __future__ import annotations

import gzip
import pickle
import shutil

import numpy as np
import pytest
from support.strokes import draw, idx_bytes

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.errors import DatasetError
from cli.experiments.reproduce.mnist import FILES, mnist, mnist_document

IMAGES, LABELS = FILES["train"]


def open_split(data, part="train", omit=()):
    return open_dataset(DatasetConfig.model_validate(mnist_document(str(data), part, omit)))


@pytest.fixture
def copied(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def test_the_images_and_labels_are_those_in_the_files(data):
    images = open_split(data)
    expected = draw((np.arange(300) % 10).astype(np.uint8), salt=1)
    assert len(images) == 300
    assert images.labels.tolist() == [sample % 10 for sample in range(300)]
    np.testing.assert_array_equal(np.asarray(images.image(17))[..., 1], expected[17])


def test_the_test_split_is_another_dataset(data):
    assert len(open_split(data, "test")) == 100
    assert open_split(data, "test").id.sha256 != open_split(data).id.sha256


def test_an_omitted_class_has_no_images_and_stays_a_class(data):
    images = open_split(data, omit=[3])
    assert len(images) == 270
    assert 3 not in images.labels
    assert images.id.num_classes == 10


def test_another_process_opens_the_files_itself(data):
    sent = pickle.dumps(open_split(data))
    assert len(sent) < 10_000
    assert pickle.loads(sent).image(5).size == (28, 28)


def test_missing_files_are_one_line_that_says_what_to_put_where(copied):
    (copied / LABELS).unlink()
    with pytest.raises(DatasetError, match=f"no {LABELS} in") as refusal:
        open_split(copied)
    text = str(refusal.value)
    assert "\n" not in text
    assert f"no {LABELS} in {copied}" in text
    assert all(name in text for names in FILES.values() for name in names)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x02ab"), "is no idx file of bytes in 3 dimensions"),
        (gzip.compress(b"\0\0\x0d\x03" + bytes(12)), "is no idx file of bytes"),
        (gzip.compress(b"\0\0"), "is no idx file"),
        (idx_bytes(np.zeros((5, 4, 4), np.uint8))[:-12], "cannot be read"),
        (gzip.compress(b"\0\0\x08\x03\0\0\0\x02\0\0\0\x02\0\0\0\x02abc"), "2 x 2 x 2 bytes"),
        (idx_bytes(np.zeros((5, 28, 28), np.uint8)), "5 images and .* has 300 labels"),
    ],
    ids=["not gzip", "dimensions", "type", "header", "cut gzip", "cut idx", "other count"],
)
def test_a_damaged_file_is_refused(copied, content, said):
    (copied / IMAGES).write_bytes(content)
    with pytest.raises(DatasetError, match=said):
        open_split(copied)


def test_no_such_part_and_nothing_left_are_refused(data):
    with pytest.raises(DatasetError, match="parts train and test, not 'val'"):
        mnist(str(data), "val")
    with pytest.raises(DatasetError, match="no images left"):
        mnist(str(data), omit=range(10))
