from __future__ import annotations

import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch import nn
from torch.nn.functional import relu

from cache_service.models.create import create_model
from cache_service.models.zoo import CIFAR_NAMES
from cache_service.models.zoo.mobile import shuffle_channels
from cache_service.models.zoo.resnet import PreActBlock

PUBLISHED_SIZES = {
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg13": 9_462_180,
    "cifar_resnet50": 23_705_252,
    "cifar_mobilenetv2": 812_836,
    "cifar_shufflenetv1": 949_258,
    "cifar_shufflenetv2": 1_355_528,
}

MAPS = {
    "resnet8x4": (256, 8),
    "resnet32x4": (256, 8),
    "resnet20": (64, 8),
    "resnet32": (64, 8),
    "resnet56": (64, 8),
    "resnet110": (64, 8),
    "wrn_16_2": (128, 8),
    "wrn_40_1": (64, 8),
    "wrn_40_2": (128, 8),
    "cifar_vgg8": (512, 4),
    "cifar_vgg13": (512, 4),
    "cifar_resnet50": (2048, 4),
    "cifar_mobilenetv2": (1280, 2),
    "cifar_shufflenetv1": (960, 4),
    "cifar_shufflenetv2": (1024, 4),
}

KEYS_OF_PUBLISHED_CHECKPOINTS = {
    "resnet8x4": ("conv1.weight", "layer2.0.downsample.1.bias", "layer3.0.bn2.weight", "fc.bias"),
    "wrn_16_2": ("block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.bias", "bn1.weight"),
    "cifar_vgg13": ("block0.0.bias", "block4.4.running_var", "classifier.weight"),
    "cifar_resnet50": ("layer1.0.shortcut.0.weight", "layer4.2.bn3.weight", "linear.weight"),
    "cifar_mobilenetv2": (
        "conv1.0.weight",
        "blocks.6.0.conv.7.bias",
        "conv2.1.weight",
        "classifier.0.bias",
    ),
    "cifar_shufflenetv1": ("layer1.0.conv3.weight", "layer2.7.bn3.bias", "linear.bias"),
    "cifar_shufflenetv2": (
        "layer1.0.bn5.bias",
        "layer2.7.conv3.weight",
        "conv2.weight",
        "linear.bias",
    ),
}


def test_every_network_is_listed_here():
    assert set(CIFAR_NAMES) == set(PUBLISHED_SIZES) == set(MAPS)


@pytest.mark.parametrize(("name", "size"), PUBLISHED_SIZES.items())
def test_a_network_is_as_large_as_published(name, size):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == size


@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_a_network_keeps_timms_convention(name, network, images):
    model = network(name)
    channels, side = MAPS[name]
    with torch.no_grad():
        map_BDHW = model.forward_features(images(32))
        logits = model(images(32))
    assert map_BDHW.shape == (2, channels, side, side)
    assert (map_BDHW >= 0).all()
    assert model.num_features == channels
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["pool_size"] == (side, side)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    pooled = model.forward_head(map_BDHW, pre_logits=True)
    torch.testing.assert_close(pooled, map_BDHW.mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), logits)


@pytest.mark.parametrize("name", ["resnet8x4", "cifar_mobilenetv2"])
def test_the_classifier_can_be_replaced_and_taken_off(name, network, images):
    model = network(name)
    model.reset_classifier(5)
    assert (model.num_classes, model(images(32)).shape) == (5, (2, 5))
    model.reset_classifier(0)
    assert model(images(32)).shape == (2, model.num_features)
    with pytest.raises(ValueError, match="pool by mean only"):
        model.reset_classifier(5, "max")


@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_every_weight_takes_part_in_the_answer(name, network, images):
    model = network(name).train()
    model(images(32)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("name", "keys"), KEYS_OF_PUBLISHED_CHECKPOINTS.items())
def test_weights_carry_the_names_of_published_checkpoints(name, keys):
    with torch.device("meta"):
        assert set(keys) <= set(timm.create_model(name).state_dict())


@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_no_name_of_timm_is_taken(name):
    assert model_entrypoint(name).__module__.startswith("cache_service.")
    taken = name.removeprefix("cifar_")
    if taken != name and timm.is_model(taken):
        assert model_entrypoint(taken).__module__.startswith("timm.")


def test_other_channels_than_three_are_possible(network):
    assert network("wrn_16_2", in_chans=1)(torch.zeros(1, 1, 32, 32)).shape == (1, 11)


def test_vgg_keeps_its_map_at_64_px(network, images):
    with torch.no_grad():
        assert network("cifar_vgg8").forward_features(images(64)).shape[2:] == (4, 4)


def test_convolutions_start_from_hes_normal_distribution():
    weight = create_model("resnet8x4", num_classes=10, seed=0).layer3[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


def test_shuffling_interleaves_the_groups():
    x = torch.arange(6.0).reshape(1, 6, 1, 1)
    assert shuffle_channels(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]


@pytest.mark.parametrize(("in_width", "stride"), [(4, 1), (2, 2)])
def test_a_wide_block_shortcuts_the_raw_input_or_projects_the_activated_one(in_width, stride):
    block = PreActBlock(in_width, 4, stride).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, in_width, 4, 4)
    wanted = x if block.convShortcut is None else block.convShortcut(relu(block.bn1(x)))
    torch.testing.assert_close(block(x), wanted)
