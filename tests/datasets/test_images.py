from __future__ import annotations

import pickle

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from cache_service.datasets import DatasetConfig, open_dataset, wrap_dataset
from cache_service.datasets.dataset import NUM_PROBES
from cache_service.datasets.pixels import to_rgb
from cache_service.errors import DatasetError, UnreadableSampleError


def opened(root):
    return open_dataset(DatasetConfig(name="folder", root=str(root)))


def many(count, seed=0):
    """A dataset in memory, and the pixels under it."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3), np.uint8)
    return [(image, number % 3) for number, image in enumerate(pixels)]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_comes_out_as_rgb(mode):
    image = PIL.Image.new("L", (6, 4), 255).convert(mode)
    dataset = wrap_dataset([(image, 0), (image, 1)])
    assert dataset.image(1).mode == "RGB"
    assert (np.asarray(dataset.image(1)) == 255).all()


def test_a_palette_with_transparency_keeps_its_colors_and_raises_no_warning(folder):
    image = PIL.Image.new("P", (4, 4), 1)
    image.putpalette([9, 9, 9, 10, 20, 30])
    image.save(folder / "ant" / "0.png", transparency=b"\x00\x80")
    assert opened(folder).image(0).getpixel((0, 0)) == (10, 20, 30)


def test_a_file_that_is_no_image_is_refused_with_its_number_and_path(folder):
    (folder / "bee" / "0.png").write_bytes(b"not a picture")
    with pytest.raises(UnreadableSampleError, match=r"sample 4 .*bee/0\.png: no image format beg"):
        opened(folder)


@pytest.mark.parametrize("format_", ["jpeg", "png", "webp", "tiff"])
def test_a_truncated_file_is_refused_never_padded(folder, format_):
    dataset = opened(folder)
    path = folder / "bee" / "0.png"
    PIL.Image.effect_noise((64, 64), 50).convert("RGB").save(path, format_)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    with pytest.raises(UnreadableSampleError, match=r"sample 4 .*bee/0\.png"):
        dataset.image(4)


def test_a_file_that_has_gone_is_refused_by_its_path(folder):
    dataset = opened(folder)
    (folder / "cow" / "3.png").unlink()
    with pytest.raises(UnreadableSampleError, match=r"sample 11 .*cow/3\.png"):
        dataset.image(11)


def test_files_are_closed_after_reading(folder, recwarn):
    dataset = opened(folder)
    for sample in range(len(dataset)):
        dataset.image(sample)
    assert not [warning for warning in recwarn if warning.category is ResourceWarning]


@pytest.mark.parametrize("sample", [-1, 12])
def test_a_sample_out_of_range_is_an_index_error(folder, sample):
    with pytest.raises(IndexError, match="which has 12 samples"):
        opened(folder).image(sample)


def test_a_dataset_is_a_sequence_of_image_and_label():
    dataset = wrap_dataset(many(9))
    image, label = dataset[4]
    assert (image.tobytes(), label) == (dataset.image(4).tobytes(), 1)
    assert [label for _, label in dataset] == dataset.labels.tolist()


def test_labels_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        wrap_dataset(many(9)).labels[0] = 1


def test_the_identity_is_the_same_every_time():
    assert wrap_dataset(many(200)).id == wrap_dataset(many(200)).id


def test_one_literal_identity_holds_over_versions():
    # A change here makes every published cache the cache of another dataset.
    items = [(np.full((2, 2, 3), number, np.uint8), number) for number in range(4)]
    assert wrap_dataset(items).id.sha256 == (
        "533c5221b5bded21ab74922b0c401b3e2a49d4b57fb6f08ebbd341e7e7327aea"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda items: items[:-1],
        lambda items: [items[1], items[0], *items[2:]],
        lambda items: [*items[:150], (items[150][0], (items[150][1] + 1) % 3), *items[151:]],
        lambda items: [(image ^ 1, label) for image, label in items],
        lambda items: [(image.reshape(5, 4, 3), label) for image, label in items],
    ],
    ids=["shorter", "reordered", "one label", "re-encoded", "other shape"],
)
def test_another_dataset_has_another_identity(change):
    items = many(200)
    assert wrap_dataset(change(items)).id.sha256 != wrap_dataset(items).id.sha256


def test_class_names_are_part_of_the_identity():
    class Named(list):
        classes = ("ant", "bee", "cow")

    class Renamed(list):
        classes = ("ant", "bee", "dog")

    kinds = (list, Named, Renamed)
    assert len({wrap_dataset(kind(many(9))).id.sha256 for kind in kinds}) == 3


def test_a_renamed_class_or_file_is_another_dataset(folder):
    before = opened(folder).id
    (folder / "ant" / "0.png").rename(folder / "ant" / "00.png")
    renamed = opened(folder).id
    (folder / "cow").rename(folder / "dog")
    assert len({before.sha256, renamed.sha256, opened(folder).id.sha256}) == 3


def test_the_pixels_that_identify_are_spread_from_first_to_last():
    read = []

    class Watched(list):
        targets = tuple(number % 3 for number in range(1000))

        def __getitem__(self, sample):
            read.append(sample)
            return super().__getitem__(sample)

    wrap_dataset(Watched(many(1000)))
    assert len(set(read)) == NUM_PROBES
    assert {0, 999} < set(read)
    assert max(np.diff(sorted(set(read)))) <= 16


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, -1], r"sample 2 .* has label -1"),
        ([0, 0, 0], "one class only"),
        ([0, 1, 1.5], "float '1.5' for a label"),
        ([0, 1, "cat"], "str 'cat' for a label"),
    ],
)
def test_labels_that_no_classifier_learns_are_refused(labels, says):
    image = np.zeros((4, 4), np.uint8)
    with pytest.raises(DatasetError, match=says):
        wrap_dataset([(image, label) for label in labels])


def test_no_samples_are_refused():
    with pytest.raises(DatasetError, match="no samples"):
        wrap_dataset([])


@pytest.mark.parametrize("setting", [{"name": ""}, {"root": ""}, {"split": ""}, {"rooot": "x"}])
def test_every_bound_of_the_settings_is_enforced(setting):
    with pytest.raises(ValidationError, match=next(iter(setting))):
        DatasetConfig(**({"name": "folder"} | setting))


def test_an_image_file_is_not_copied_and_outlives_its_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    for name, mode in (("a.png", "RGB"), ("b.png", "L"), ("c.jpg", "RGB"), ("d.png", "RGBA")):
        PIL.Image.fromarray(pixels).convert(mode).save(tmp_path / name)
        with PIL.Image.open(tmp_path / name) as image:
            wanted = np.asarray(image.convert("RGB"))
        with PIL.Image.open(tmp_path / name) as image:
            found = to_rgb(image, owned=True)
            assert (found is image) == (mode == "RGB")
        (tmp_path / name).unlink()
        assert found.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(found), wanted)
        np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(found))), wanted)


def test_an_image_of_a_dataset_in_memory_is_copied():
    kept = PIL.Image.new("RGB", (4, 4))
    to_rgb(kept).putpixel((0, 0), (1, 2, 3))
    assert kept.getpixel((0, 0)) == (0, 0, 0)
    array = np.zeros((4, 4, 3), np.uint8)
    to_rgb(array).putpixel((0, 0), (1, 2, 3))
    assert not array.any()
