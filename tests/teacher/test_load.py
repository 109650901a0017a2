from __future__ import annotations

import pathlib
import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from cache_service.errors import ConfigError, UnsupportedError, UntrainedTeacherError
from cache_service.models.create import create_model
from cache_service.models.weights_digest import weights_sha256


@pytest.fixture
def checkpoint(tmp_path):
    """Weights of a resnet8x4 with ten classes."""
    path = tmp_path / "teacher.safetensors"
    save_file(create_model("resnet8x4", num_classes=10, seed=7).state_dict(), path)
    return str(path)


@pytest.fixture
def published(tmp_path):
    """Settings under which timm finds the published weights of test_resnet in a local file."""
    path = tmp_path / "published.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    overlay = {"pretrained_cfg_overlay": {"file": str(path)}}
    return {"model": "test_resnet.r160_in1k", "pretrained": True, "model_args": overlay}


def test_a_checkpoint_is_what_the_identity_is_made_of(load, checkpoint):
    teacher = load(checkpoint=checkpoint, allow_untrained=False)
    same = create_model("resnet8x4", num_classes=10, seed=7)
    assert teacher.id.weights_sha256 == weights_sha256(same)
    assert (teacher.id.model, teacher.id.num_classes) == ("resnet8x4", 10)


def test_a_teacher_without_weights_is_refused_before_anything_is_made(load):
    with pytest.raises(UntrainedTeacherError, match=r"random weights.*allow_untrained: true"):
        load(allow_untrained=False)


def test_an_untrained_teacher_is_the_same_one_after_a_restart(load):
    assert load().id == load().id
    assert load(seed=1).id != load(seed=2).id


def test_the_teacher_is_frozen(load, views):
    teacher = load(given={"scales": (1, 2, 4)})
    first = teacher.answer(views)
    assert (teacher.answer(views) == first).all()  # batch norm would have moved


def test_published_weights_come_with_their_size_and_classes(load, published):
    teacher = load(**published, given={"num_classes": 1000})
    assert (teacher.id.num_classes, teacher.id.preprocess.size) == (1000, 160)


def test_a_published_head_is_never_swapped_for_random_weights(load, published):
    with pytest.raises(ConfigError, match=r"published with 1000 classes; its head for 10 would"):
        load(**published)


def test_more_classes_than_the_dataset_must_be_asked_for(load, published, checkpoint):
    assert load(**published, num_classes=1000).id.num_classes == 1000
    with pytest.raises(ConfigError, match=r"7 outputs \(the dataset's classes\).*\[10"):
        load(checkpoint=checkpoint, given={"num_classes": 7})
    teacher = load(checkpoint=checkpoint, num_classes=10, given={"num_classes": 7})
    assert teacher.id.num_classes == 10


def test_fewer_classes_than_the_dataset_are_refused_with_both_numbers(load, checkpoint, factories):
    for settings in (
        {"checkpoint": checkpoint, "num_classes": 10},
        {"model": f"{factories}:five"},
        {"num_classes": 10},
    ):
        with pytest.raises(ConfigError, match=r"answers (10|5) classes and the dataset has 100"):
            load(**settings, given={"num_classes": 100})
    with pytest.raises(ConfigError, match=r"with 100 outputs.*\[10"):
        load(checkpoint=checkpoint, given={"num_classes": 100})


def test_a_factory_with_more_classes_than_asked_for_is_noticed(load, factories):
    with pytest.raises(ConfigError, match=r"5 classes and the dataset has 4.*num_classes: 5"):
        load(f"{factories}:five", given={"num_classes": 4})
    settings = {"num_classes": 5, "given": {"num_classes": 4}}
    assert load(f"{factories}:five", **settings).id.num_classes == 5


class _Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's remark, before it refuses
@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_refused_and_never_runs(load, tmp_path, protocol, zipped):
    proof, path = tmp_path / "ran", tmp_path / "hostile.pt"
    weights = {"fc.bias": _Touch(proof), "conv1.weight": torch.zeros(1)}
    options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
    torch.save(weights, path, **options)
    with pytest.raises(ConfigError, match=r"hostile\.pt") as refusal:
        load(checkpoint=str(path))
    assert "\n" not in str(refusal.value)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the file does what it is feared to do
    assert proof.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_bare_pickle_is_refused_and_never_runs(load, tmp_path):
    (tmp_path / "bare.pth").write_bytes(pickle.dumps(_Touch(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"bare\.pth"):
        load(checkpoint=str(tmp_path / "bare.pth"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "resnet32x5"}, "no model 'resnet32x5'"),
        ({"checkpoint": "nowhere.pt"}, r"nowhere\.pt is not a file"),
        ({"model": "test_vit", "input_size": 33}, r"cannot be fed 33 x 33 px.*input_size"),
        ({"precision": "float16"}, "float16 needs a GPU"),
        ({"given": {"device": "abacus"}}, "device 'abacus' is not known"),
    ],
)
def test_a_teacher_that_cannot_be_loaded_says_why_in_one_line(load, settings, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        load(**settings)
    assert "\n" not in str(refusal.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused(load):
    with pytest.raises(ConfigError, match="no GPU here"):
        load(given={"device": "cuda"})


def test_a_network_that_answers_no_logits_is_refused(load, factories):
    with pytest.raises(
        UnsupportedError,
        match=r"answers a tuple of 0: \(2, 10\), 1: .*teacher\.output to .* example 0",
    ):
        load(f"{factories}:pair")


def test_the_name_carries_arguments_and_no_folder(load):
    assert load(model_args={}).id.model == "resnet8x4"
    named = load("test_resnet", model_args={"drop_path_rate": 0.1}).id.model
    assert named == 'test_resnet{"drop_path_rate":0.1}'
