from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import timm.data
import torch
from torch.utils.data import Dataset, IterableDataset, Subset
from torchvision.datasets import ImageFolder, VisionDataset

from cache_service.datasets import wrap_dataset
from cache_service.errors import DatasetError, UnreadableSampleError

IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


class Lists(Dataset):
    """Lists its labels; counts what is read."""

    def __init__(self, actual, **attributes):
        self.actual, self.reads = actual, 0
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.actual)

    def __getitem__(self, index):
        self.reads += 1
        return IMAGE, self.actual[index]


LABELS = [number % 5 for number in range(500)]


@pytest.mark.parametrize(
    "attributes",
    [
        {"targets": LABELS},
        {"targets": torch.tensor(LABELS)},
        {"labels": np.array(LABELS, np.uint8)},
        {"_labels": LABELS},
        {"samples": [("a.png", label) for label in LABELS]},
    ],
    ids=["list", "tensor", "array", "private", "samples"],
)
def test_listed_labels_are_used_without_reading_images(attributes):
    items = Lists(LABELS, **attributes)
    assert wrap_dataset(items).labels.tolist() == LABELS
    assert items.reads < 100


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"labels": ["a", "b", "c", "d", "e"]},
        {"targets": [(label, 0) for label in LABELS]},
        {"targets": None, "samples": ["a.png"] * 500},
    ],
    ids=["none", "names", "several a sample", "paths only"],
)
def test_labels_that_are_not_listed_are_read_once(attributes):
    items = Lists(LABELS, **attributes)
    assert wrap_dataset(items).labels.tolist() == LABELS
    assert 500 <= items.reads < 600


def test_labels_that_disagree_with_the_samples_are_refused():
    with pytest.raises(DatasetError, match=r"lists label 1 for sample 0, but .* gives label 0"):
        wrap_dataset(Lists([0, 1, 2], targets=[1, 1, 2]))


def test_a_target_transform_is_applied_to_listed_labels():
    class Shifted(VisionDataset):
        targets = (1, 2, 3)

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return IMAGE, self.target_transform(self.targets[index])

    dataset = wrap_dataset(Shifted("", target_transform=lambda label: label - 1))
    assert dataset.labels.tolist() == [0, 1, 2]


def test_a_subset_has_the_labels_and_classes_of_its_part(folder):
    whole = ImageFolder(str(folder))
    dataset = wrap_dataset(Subset(whole, [11, 0, 5]))
    assert (dataset.labels.tolist(), dataset.classes) == ([2, 0, 1], ("ant", "bee", "cow"))
    assert dataset.image(0).tobytes() == whole[11][0].tobytes()


def test_a_random_transform_left_inside_is_refused():
    class Flips(Lists):
        def __getitem__(self, index):
            self.reads += 1
            return (IMAGE if self.reads % 3 else IMAGE[:, ::-1]), self.actual[index]

    with pytest.raises(DatasetError, match="two different images for sample"):
        wrap_dataset(Flips(LABELS, targets=LABELS))


@pytest.mark.parametrize(
    "image",
    [IMAGE, IMAGE[..., :1], IMAGE[..., 0], torch.tensor(IMAGE), PIL.Image.fromarray(IMAGE)],
    ids=["HW3", "HW1", "HW", "tensor", "PIL"],
)
def test_images_may_be_pixels_or_pil(image):
    pixels = np.asarray(wrap_dataset([(image, 0), (image, 1)]).image(0))
    assert pixels.shape == (4, 4, 3)
    assert (pixels[..., 0] == IMAGE[..., 0]).all()


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"uint8\[3, 8, 8\]; expected"),
        (torch.zeros(3, 8, 8), r"float32\[3, 8, 8\]; expected"),
        ("a.png", "of type str; expected"),
    ],
)
def test_other_images_are_refused_with_what_they_are(image, says):
    with pytest.raises(UnreadableSampleError, match=says):
        wrap_dataset([(image, 0), (image, 1)])


@pytest.mark.parametrize("item", [{"image": IMAGE, "label": 0}, (IMAGE,), IMAGE])
def test_items_that_are_no_pairs_are_refused(item):
    with pytest.raises(DatasetError, match=r"expected \(image, label\)"):
        wrap_dataset([item, item])


def test_a_stream_is_refused():
    class Stream(IterableDataset):
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([])

    for stream in (Stream(), iter([])):
        with pytest.raises(DatasetError, match="cannot be read by sample number"):
            wrap_dataset(stream)


def test_a_timm_dataset_never_swaps_a_damaged_sample_for_its_neighbor(folder):
    dataset = wrap_dataset(timm.data.create_dataset("", str(folder)))
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (dataset.classes, dataset.describe(4)) == (("ant", "bee", "cow"), "bee/0.png")
    (folder / "bee" / "0.png").write_bytes(b"damaged")  # indexing timm's dataset gives sample 5
    with pytest.raises(UnreadableSampleError, match="sample 4"):
        dataset.image(4)


def test_a_timm_dataset_with_a_transform_is_refused(folder):
    items = timm.data.create_dataset("", str(folder))
    items.transform = torch.nn.Identity()
    with pytest.raises(DatasetError, match="without transforms"):
        wrap_dataset(items)


def test_a_dataset_that_is_open_already_is_returned_as_it_is():
    dataset = wrap_dataset([(IMAGE, 0), (IMAGE, 1)])
    assert wrap_dataset(dataset) is dataset


def test_class_names_follow_a_target_transform_that_renumbers_them(folder):
    order = {0: 2, 1: 0, 2: 1}
    dataset = wrap_dataset(ImageFolder(folder, target_transform=order.__getitem__))
    plain = wrap_dataset(ImageFolder(folder))
    named = [dataset.classes[label] for label in dataset.labels]
    assert named == [plain.classes[label] for label in plain.labels]


def test_a_target_transform_that_merges_classes_leaves_them_without_names(folder):
    dataset = wrap_dataset(ImageFolder(folder, target_transform=lambda label: label // 2))
    assert dataset.classes == ()


def test_a_subset_of_an_image_folder_is_read_like_the_folder(folder):
    for sample in range(4):
        PIL.Image.fromarray(np.full((4, 4), 300, np.uint16)).save(folder / "ant" / f"{sample}.png")
    subset = Subset(ImageFolder(folder), [0, 4])
    with pytest.raises(DatasetError, match="nothing says which value is white"):
        wrap_dataset(subset)
    (folder / "ant" / "again").symlink_to(".")
    with pytest.raises(DatasetError, match="is the same folder as"):
        wrap_dataset(Subset(ImageFolder(folder), [0, 4]))
