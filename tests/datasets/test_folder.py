from __future__ import annotations

import shutil

import PIL.Image
import pytest
from torchvision.datasets import ImageFolder

from cache_service.datasets import DatasetConfig, open_dataset, wrap_dataset
from cache_service.errors import DatasetError


def opened(root, **settings):
    return open_dataset(DatasetConfig(name="folder", root=str(root), **settings))


def test_classes_and_files_are_numbered_by_name(folder):
    dataset = opened(folder)
    assert dataset.classes == ("ant", "bee", "cow")
    assert dataset.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert dataset.describe(6) == str(folder / "bee" / "2.png")
    assert dataset.image(6).tobytes() == PIL.Image.open(folder / "bee" / "2.png").tobytes()


def test_the_order_and_the_identity_are_those_of_torchvision(folder):
    for below in ("ant/nested", "ant/nested-b", "ant/nested/deeper"):
        (folder / below).mkdir()
        shutil.copy(folder / "ant" / "0.png", folder / below / "a.PNG")
    (folder / "a b").mkdir()
    shutil.copy(folder / "bee" / "1.png", folder / "a b" / "-.png")
    ours, theirs = opened(folder), ImageFolder(str(folder))
    assert [ours.describe(i) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets
    assert wrap_dataset(theirs).id.sha256 == ours.id.sha256


def test_the_same_files_elsewhere_are_the_same_dataset(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    assert opened(tmp_path / "moved").id == opened(folder).id


def test_hidden_files_and_other_files_are_no_images(folder):
    before = opened(folder).id
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "ant" / ".thumbs").mkdir()
    for junk in ("ant/._0.png", "ant/.thumbs/0.png", "ant/notes.txt", "README.png"):
        (folder / junk).write_bytes(b"junk")
    assert opened(folder).id == before


@pytest.mark.parametrize("split", ["train", "training"])
def test_a_split_is_a_subfolder_under_any_of_its_names(folder, split):
    (folder.parent / "root" / "val").mkdir(parents=True)
    folder.rename(folder.parent / "root" / "train")
    assert opened(folder.parent / "root", split=split).describe(0).endswith("root/train/ant/0.png")


def test_splits_are_never_taken_for_classes(folder):
    root = folder.parent / "root"
    root.mkdir()
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder, root / "val")
    with pytest.raises(DatasetError, match=r"no split 'test' in .*, only train, val"):
        opened(root, split="test")


def test_a_class_may_be_named_train(folder):
    (folder / "cow").rename(folder / "train")
    assert opened(folder).classes == ("ant", "bee", "train")


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(DatasetError, match=f"no folder at {tmp_path}/nowhere"):
        opened(tmp_path / "nowhere")


def test_a_root_that_is_a_file_is_called_one(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(DatasetError, match=r"images\.zip: there is a file; unpack it"):
        opened(tmp_path / "images.zip")


def test_a_folder_without_classes_says_what_was_looked_for(tmp_path):
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(DatasetError, match=rf"looked for {tmp_path}/<class>/<image>"):
        opened(tmp_path)


def test_an_empty_class_is_refused_by_name(folder):
    (folder / "dog").mkdir()
    with pytest.raises(DatasetError, match=r"no image in .*dog: looked for \.jpg"):
        opened(folder)


def test_one_class_is_refused(folder):
    shutil.rmtree(folder / "ant")
    shutil.rmtree(folder / "bee")
    with pytest.raises(DatasetError, match="one class only"):
        opened(folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"name": "folder"}, "needs `root`"), ({"name": "folder", "args": {"a": 1}}, "takes no args")],
)
def test_settings_that_would_be_ignored_are_refused(settings, says):
    with pytest.raises(DatasetError, match=says):
        open_dataset(DatasetConfig(**settings))


@pytest.mark.parametrize(
    ("link", "target", "other"),
    [
        ("ant/again", ".", "ant"),
        ("ant/deep/again", "..", "ant"),
        ("ant/up", "..", ""),
        ("ant/root", "/", "/"),
        ("ant/bees", "../bee", "bee"),
        ("dog", "ant", "ant"),
        ("dog", ".", ""),
    ],
    ids=["itself", "its parent", "the dataset", "the disk", "another class", "class", "all"],
)
def test_a_link_that_reaches_a_folder_twice_is_refused_with_both_paths(folder, link, target, other):
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(target)
    with pytest.raises(DatasetError, match=r"is the same folder as .* counted twice") as refusal:
        opened(folder)
    assert str(folder / other) in str(refusal.value)
    assert "Move the link out of the dataset folder" in refusal.value.hint


def test_a_folder_linked_from_elsewhere_is_read_once(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "cow").rename(elsewhere / "cow")
    (folder / "cow").symlink_to(elsewhere / "cow")
    assert len(opened(folder)) == 12


def test_links_between_two_folders_are_refused(folder):
    for one, other in (("ant", "bee"), ("bee", "ant")):
        (folder / one / "to").symlink_to(folder / other)
    with pytest.raises(DatasetError, match="is the same folder as"):
        opened(folder)


def test_a_hidden_folder_is_not_entered(folder):
    (folder / "ant" / ".again").symlink_to(".")
    assert len(opened(folder)) == 12


def test_a_loop_in_torchvisions_image_folder_is_refused(folder):
    (folder / "ant" / "again").symlink_to(".")
    with pytest.raises(DatasetError, match="is the same folder as"):
        wrap_dataset(ImageFolder(folder))


def test_a_loop_in_timms_image_folder_is_refused(folder):
    from timm.data import create_dataset

    assert len(wrap_dataset(create_dataset("", root=str(folder)))) == 12
    (folder / "ant" / "again").symlink_to(".")
    with pytest.raises(DatasetError, match="is the same folder as"):
        wrap_dataset(create_dataset("", root=str(folder)))
