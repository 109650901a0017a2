"""Flat folders with a file of labels, in the forms in which data sets publish them."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from cache_service.datasets import DatasetConfig, open_dataset
from cache_service.datasets.folder import EXTENSIONS
from cache_service.errors import DatasetError

WNIDS = ("n01440764", "n01443537", "n01484850")
CLASS_OF = (2, 0, 1, 2, 0)


@pytest.fixture
def root(tmp_path):
    """Training folders of three classes, and five validation images without any."""
    for number, name in enumerate(WNIDS):
        (tmp_path / "train" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (6, 6), (80 * number, 0, 0)).save(tmp_path / "train" / name / "0.png")
    (tmp_path / "val").mkdir()
    for number, label in enumerate(CLASS_OF, 1):
        image = PIL.Image.new("RGB", (6, 6), (80 * label, 0, 0))
        image.save(tmp_path / "val" / f"ILSVRC2012_val_{number:08}.JPEG", quality=100)
    return tmp_path


def name(number, ending=".JPEG"):
    return f"ILSVRC2012_val_{number:08}{ending}"


def opened(root, labels, *, class_names=WNIDS, file="labels.txt", **settings):
    (root / file).write_text(labels)
    config = DatasetConfig(name="folder", root=str(root), split="val", labels=file, **settings)
    return open_dataset(config, class_names=class_names)


FILES = {
    "file number": [f"{name(n)} {c}" for n, c in enumerate(CLASS_OF, 1)],
    "number file": [f"{c} {name(n)}" for n, c in enumerate(CLASS_OF, 1)],
    "tab": [f"{name(n)}\t{WNIDS[c]}" for n, c in enumerate(CLASS_OF, 1)],
    "with folders": [f"./val/{name(n)} {c}" for n, c in enumerate(CLASS_OF, 1)],
    "absolute": [f"/data/imagenet/val/{name(n)} {c}" for n, c in enumerate(CLASS_OF, 1)],
    "csv": ["file,label", *(f"{name(n)},{WNIDS[c]}" for n, c in enumerate(CLASS_OF, 1))],
    "csv without header": [f"{name(n)}, {WNIDS[c]}" for n, c in enumerate(CLASS_OF, 1)],
    "semicolons": ["file;label", *(f"{name(n)};{WNIDS[c]}" for n, c in enumerate(CLASS_OF, 1))],
    "backslashes": [f"val\\{name(n)},{WNIDS[c]}" for n, c in enumerate(CLASS_OF, 1)],
    "floats": ["image,label", *(f"{name(n)},{c}.0" for n, c in enumerate(CLASS_OF, 1))],
    "own titles": ["photo,kind", *(f"{name(n)},{c}" for n, c in enumerate(CLASS_OF, 1))],
    "more columns": [
        "width,image_id,label,url",
        *(f'6,{name(n, "")},{WNIDS[c]},"a, b"' for n, c in enumerate(CLASS_OF, 1)),
    ],
    "kaggle": [
        "ImageId,PredictionString",
        *(
            f"{name(n, '')},{WNIDS[c]} 1 2 3 4" + f" {WNIDS[c]} 5 6 7 8" * (n % 2) + " "
            for n, c in reversed(list(enumerate(CLASS_OF, 1)))
        ),
    ],
    "synset per line": [WNIDS[c] for c in CLASS_OF],
    "number per line": [str(c) for c in CLASS_OF],
}


@pytest.mark.parametrize("form", FILES)
def test_every_form_gives_the_labels_of_training(root, form):
    dataset = opened(root, "\n".join(FILES[form]) + "\n\n")
    assert dataset.labels.tolist() == list(CLASS_OF)
    assert dataset.classes == WNIDS
    for sample, label in enumerate(CLASS_OF):
        assert abs(dataset.image(sample).getpixel((3, 3))[0] - 80 * label) <= 2
    assert dataset.id == opened(root, "\n".join(FILES["synset per line"])).id


NAMES = {
    "map_clsloc": [f"{w} {n} a_fish" for n, w in zip((2, 3, 1), WNIDS, strict=True)],
    "number name": [f"{n} {w}" for n, w in zip((2, 3, 1), WNIDS, strict=True)],
    "from 1": [WNIDS[2], WNIDS[0], WNIDS[1]],
    "words": [f"{WNIDS[2]} great white shark, Carcharodon", f"{WNIDS[0]} tench", WNIDS[1]],
}


@pytest.mark.parametrize("form", NAMES)
def test_the_numbers_of_a_ground_truth_mean_classes_by_a_second_file(root, form):
    # As in the development kit, whose numbers do not follow the order of the wnids.
    truth = {2: 1, 0: 2, 1: 3}
    (root / "names.txt").write_text("\n".join(NAMES[form]))
    labels = "\n".join(str(truth[c]) for c in CLASS_OF)
    dataset = opened(root, labels, label_names="names.txt")
    assert dataset.labels.tolist() == list(CLASS_OF)


def test_names_with_spaces_are_whole_lines(root):
    (root / "names.txt").write_text("great white shark\ntench\ngold fish of a pond\n")
    dataset = opened(
        root, "\n".join(FILES["number per line"]), class_names=(), label_names="names.txt"
    )
    assert dataset.classes == ("gold fish of a pond", "great white shark", "tench")
    assert [dataset.classes[label] for label in dataset.labels[:3]] == [
        "gold fish of a pond",
        "great white shark",
        "tench",
    ]


def test_class_folders_that_are_numbers_are_matched_by_name_not_by_position(root):
    numbers = tuple(str(number) for number in (0, 1, 10, 2))
    dataset = opened(root, "10\n0\n2\n10\n1\n", class_names=numbers)
    assert [numbers[label] for label in dataset.labels] == ["10", "0", "2", "10", "1"]


def test_numbers_without_names_anywhere_are_labels(root):
    dataset = opened(root, "\n".join(FILES["file number"]), class_names=())
    assert (dataset.labels.tolist(), dataset.classes) == (list(CLASS_OF), ())


def test_a_class_without_an_image_is_kept_where_training_has_it(root):
    dataset = opened(root, "\n".join(f"{name(n)} {min(c, 1)}" for n, c in enumerate(CLASS_OF, 1)))
    assert dataset.id.num_classes == 3


def test_a_training_split_may_be_flat_too(root):
    for number in range(4):
        PIL.Image.new("RGB", (4, 4), (number, 0, 0)).save(root / f"{number}.png")
    for split in ("train", "val"):
        (root / split).rename(root / f"other-{split}")
    (root / "labels.csv").write_text("id,breed\n0,pug\n1,collie\n2,pug\n3,collie\n")
    (root / "flat").mkdir()
    for number in range(4):
        (root / f"{number}.png").rename(root / "flat" / f"{number}.png")
    dataset = open_dataset(
        DatasetConfig(name="folder", root=str(root), split="flat", labels="labels.csv")
    )
    assert (dataset.labels.tolist(), dataset.classes) == ([1, 0, 1, 0], ("collie", "pug"))


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ("\n".join(FILES["file number"][:3]), None),
        ("\n".join(f"{name(n)} {n}" for n in range(1, 6)), "from 1 to 5; whether 0 or 1.*map_clsl"),
        (
            "\n".join(f"{name(n)} {n}" for n in range(5)),
            r"txt line 1 lists .*_00000000.JPEG",
        ),
        ("\n".join(f"{name(n)} {3 * n - 3}" for n in range(1, 6)), "up to 12, but training has 3"),
        ("\n".join([*FILES["tab"], f"{name(9)}\t{WNIDS[0]}"]), "line 6 lists .*_00000009.JPEG"),
        ("\n".join([f"{name(9)}\t{WNIDS[0]}", *FILES["tab"]]), "line 1 lists .*_00000009.JPEG"),
        (
            "\n".join([*FILES["tab"], f"{name(1)}\t{WNIDS[0]}"]),
            "line 6 has classes 'n01484850' a",
        ),
        ("\n".join([*FILES["tab"][:4], name(5)]), "line 5: expected a file and a class"),
        (
            "\n".join(FILES["synset per line"][:4]),
            "a class per line, 4 in all, .* has 5 im",
        ),
        ("\n".join(name(n) for n in range(1, 6)), "lists files, but no classes"),
        ("\n".join(f"x{n}.jpg 1" for n in range(5)), "has no column of image files: its second"),
        (
            f"a,b,c\n{name(1)},1,2\n{name(2)},2,3",
            "several columns that could be .*: a, b, c",
        ),
        (f"ImageId,PredictionString\n{name(1)},{WNIDS[0]} 1 2 3 4 {WNIDS[1]} 1 2 3 4", "no class"),
        ("", "labels.txt is empty"),
        (
            "\n".join(f"{name(n)} n0000000{c}" for n, c in enumerate(CLASS_OF, 1)),
            "are not those of",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_does_not_fit_is_refused_by_file_and_line(root, labels, says):
    if says is None:
        dataset = opened(root, labels)
        assert "2 images that " in dataset.left_out
        assert f"does not list, such as {root}/val/{name(4)}" in dataset.left_out
        return
    with pytest.raises(Exception, match=says) as refusal:
        opened(root, labels)
    assert refusal.value.exit_code == 2
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("n01440764\nn01443537\n", "no name for number 2"),
        ("n01440764 0\nn01443537 0\n", "no name for number 1"),
        ("n01440764 0\nn01443537 1\nn01484850 2\nn01484851 2\n", "two names for one number"),
    ],
)
def test_a_file_of_names_that_does_not_fit_is_refused(root, names, says):
    (root / "names.txt").write_text(names)
    with pytest.raises(DatasetError, match=says):
        opened(root, "\n".join(FILES["file number"]), label_names="names.txt")


def test_names_that_may_begin_at_0_or_at_1_are_refused(root):
    (root / "names.txt").write_text("a\nb\nc\nd\ne\n")
    with pytest.raises(DatasetError, match="whether the first name is number 0 or 1"):
        opened(root, "1\n2\n1\n2\n3\n", label_names="names.txt")


def test_a_file_of_names_beside_names_is_refused(root):
    (root / "names.txt").write_text("a 0\n")
    with pytest.raises(DatasetError, match=r"are no numbers, such as 'n01"):
        opened(root, "\n".join(FILES["tab"]), label_names="names.txt")


def test_a_missing_file_of_labels_is_named_with_where_it_was_looked_for(root):
    config = DatasetConfig(name="folder", root=str(root), split="val", labels="data/labels.txt")
    with pytest.raises(DatasetError, match=rf"{root}/data/labels.txt cannot be read.*dataset.root"):
        open_dataset(config)


def test_a_flat_split_without_labels_names_the_setting_and_no_other_split(root):
    with pytest.raises(DatasetError, match=r"no class folders in .*/val: .* found 5 images") as no:
        open_dataset(DatasetConfig(name="folder", root=str(root), split="val"))
    assert "Set dataset.labels to a file" in no.value.hint
    assert "train" not in no.value.hint


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "digits", "labels": "x"},
        {"name": "folder", "label_names": "x"},
        {"name": "folder", "labels": ""},
        {"name": "folder", "labels": "x", "label_names": ""},
    ],
)
def test_settings_of_labels_that_would_be_ignored_are_refused(settings):
    with pytest.raises(ValidationError, match="label"):
        DatasetConfig(**settings)


def test_what_a_folder_holds_and_was_not_taken_is_counted_and_named(folder):
    for path in ("ant/a.gif", "bee/b.GIF", "bee/c.avif", "cow/notes", "d.png", "e.gif", "read.txt"):
        (folder / path).write_bytes(b"")
    (folder / "ant" / ".hidden.gif").write_bytes(b"")
    dataset = open_dataset(DatasetConfig(name="folder", root=str(folder)))
    assert len(dataset) == 12
    assert dataset.left_out == (
        f"2 .gif, 1 .avif, 1 without extension, such as {folder}/ant/a.gif; "
        f"2 images beside the class folders, such as {folder}/d.png"
    )


def test_a_class_of_files_that_are_not_taken_is_refused_with_their_kinds(folder):
    (folder / "dog").mkdir()
    for number in range(3):
        (folder / "dog" / f"{number}.gif").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"no image in .*/dog: looked for .*, and found 3 \.gif"):
        open_dataset(DatasetConfig(name="folder", root=str(folder)))


def test_jfif_is_a_jpeg(folder):
    pixels = np.full((8, 8, 3), 90, np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "cow" / "9.JFIF", "jpeg", quality=100)
    dataset = open_dataset(DatasetConfig(name="folder", root=str(folder)))
    assert dataset.describe(12).endswith("cow/9.JFIF")
    assert (np.asarray(dataset.image(12)) == 90).all()
    assert ".jfif" in EXTENSIONS


def test_an_empty_class_of_training_may_have_no_image_in_another_split(folder):
    for image in (folder / "bee").iterdir():
        image.unlink()
    config = DatasetConfig(name="folder", root=str(folder))
    dataset = open_dataset(config, class_names=("ant", "bee", "cow"))
    assert dataset.labels.tolist() == [0] * 4 + [2] * 4
    assert dataset.left_out == "no image of class bee"
    with pytest.raises(DatasetError, match=r"no image in .*bee"):
        open_dataset(config, class_names=("ant", "cow"))
    (folder / "bee" / "0.gif").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"no image in .*bee: .*found 1 \.gif"):
        open_dataset(config, class_names=("ant", "bee", "cow"))
