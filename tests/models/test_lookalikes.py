"""Names that mean two networks are pointed out, by the weights and by the size of the images."""

from __future__ import annotations

import pytest
import timm
import torch
from torchvision.models import get_model

from cache_service.errors import ConfigError
from cache_service.models.create import create_model
from cache_service.models.lookalikes import IMAGENET_FORMS, find_lookalikes, small_image_notice
from cache_service.models.weights import load_checkpoint
from cache_service.models.zoo import CIFAR_NAMES


def empty(name, num_classes):
    """The state dict of a network, without memory for its weights."""
    with torch.device("meta"):
        if name.startswith("torchvision/"):
            return get_model(name.partition("/")[2], num_classes=num_classes).state_dict()
        return timm.create_model(name, num_classes=num_classes).state_dict()


@pytest.mark.parametrize(
    ("name", "asked", "named"),
    [
        ("cifar_vgg13", "vgg13", ["cifar_vgg13"]),
        ("cifar_vgg16", "torchvision/vgg16_bn", ["cifar_vgg16"]),
        ("cifar_resnet18", "resnet18", ["cifar_resnet18"]),
        ("cifar_preact_resnet18", "resnet18.a1_in1k", ["cifar_preact_resnet18"]),
        ("cifar_mobilenetv2", "mobilenetv2_050", ["cifar_mobilenetv2"]),
        ("resnet18", "cifar_resnet18", ["resnet18", "torchvision/resnet18"]),
        ("vgg11_bn", "cifar_vgg11", ["vgg11_bn"]),
        ("torchvision/vgg11", "vgg11", ["torchvision/vgg11"]),
        ("resnet14", "resnet20", ["resnet14"]),
        ("wrn_16_1", "my_nets:build", ["wrn_16_1"]),
        ("resnet34", "vgg11", []),
    ],
)
def test_weights_of_the_other_network_are_named_with_their_classes(name, asked, named):
    found = find_lookalikes(empty(name, 7), asked)
    assert [each.name for each in found] == named
    assert {each.num_classes for each in found} <= {7}


def test_the_refusal_names_the_other_network(tmp_path):
    weights = create_model("cifar_mobilenetv2", num_classes=7).state_dict()
    torch.save({"model": weights}, tmp_path / "a.pth")
    model = create_model("resnet8", num_classes=7)
    says = "It fits cifar_mobilenetv2 with 7 classes: name that as the model."
    with pytest.raises(ConfigError, match=says) as refusal:
        load_checkpoint(model, tmp_path / "a.pth", model_name="mobilenetv2_100")
    assert "\n" not in str(refusal.value)


def test_another_number_of_classes_is_told_from_another_network(tmp_path):
    weights = create_model("resnet8", num_classes=100).state_dict()
    torch.save({f"net.{key}": value for key, value in weights.items()}, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match="It is of the same network with 100 outputs"):
        load_checkpoint(
            create_model("resnet8", num_classes=10), tmp_path / "a.pth", model_name="resnet8"
        )


@pytest.mark.parametrize(
    "change",
    [
        lambda w: {key: value for key, value in w.items() if key != "conv1.weight"},
        lambda w: w | {"extra": torch.zeros(1)},
        lambda w: w | {"conv1.weight": torch.zeros(16, 1, 3, 3)},
        lambda w: w | {"fc.weight": torch.zeros(5, 64)},
        lambda w: {},
    ],
    ids=["missing", "extra", "channels", "half a head", "nothing"],
)
def test_what_fits_nothing_is_not_named(change):
    assert find_lookalikes(change(empty("resnet8", 100)), "resnet8") == []


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("resnet18", "cifar_resnet18"),
        ("resnet50.a1_in1k", "cifar_resnet50"),
        ("torchvision/vgg13_bn", "cifar_vgg13"),
        ("mobilenetv2_100", "cifar_mobilenetv2"),
        ("torchvision/shufflenet_v2_x1_0", "cifar_shufflenetv2"),
    ],
)
def test_an_imagenet_student_on_small_images_gets_a_notice(name, named):
    assert f"CIFAR papers is {named}." in small_image_notice(name, 32)
    assert small_image_notice(name, 64) is None


@pytest.mark.parametrize("name", ["resnet8x4", "cifar_resnet18", "resnet34", "mine:resnet18"])
def test_other_students_get_no_notice(name):
    assert small_image_notice(name, 32) is None


def test_the_table_names_networks_that_exist():
    assert set(IMAGENET_FORMS) <= set(CIFAR_NAMES)
    for form in {form for forms in IMAGENET_FORMS.values() for form in forms}:
        if not timm.is_model(form):
            with torch.device("meta"):
                get_model(form, weights=None)
