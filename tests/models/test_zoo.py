from __future__ import annotations

import hashlib
import json

import pytest
import timm
import torch
from timm.models import model_entrypoint
from torch import nn
from torch.nn.functional import relu

from cache_service.models.create import create_model
from cache_service.models.features import check_cells
from cache_service.models.zoo import CIFAR_NAMES
from cache_service.models.zoo.mobile import shuffle_channels
from cache_service.models.zoo.resnet import ActivatedBlock, PreActBlock

PUBLISHED_SIZES = {
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "cifar_vgg8": 3_965_028,
    "cifar_vgg11": 9_277_284,
    "cifar_vgg13": 9_462_180,
    "cifar_vgg16": 14_774_436,
    "cifar_vgg19": 20_086_692,
    "cifar_resnet18": 11_220_132,
    "cifar_resnet50": 23_705_252,
    "cifar_preact_resnet18": 11_217_444,
    "cifar_mobilenetv2": 812_836,
    "cifar_shufflenetv1": 949_258,
    "cifar_shufflenetv2": 1_355_528,
}

MAPS = {
    "resnet8x4": (256, 8),
    "resnet32x4": (256, 8),
    "resnet8": (64, 8),
    "resnet14": (64, 8),
    "resnet20": (64, 8),
    "resnet32": (64, 8),
    "resnet44": (64, 8),
    "resnet56": (64, 8),
    "resnet110": (64, 8),
    "wrn_16_1": (64, 8),
    "wrn_16_2": (128, 8),
    "wrn_40_1": (64, 8),
    "wrn_40_2": (128, 8),
    "cifar_vgg8": (512, 4),
    "cifar_vgg11": (512, 4),
    "cifar_vgg13": (512, 4),
    "cifar_vgg16": (512, 4),
    "cifar_vgg19": (512, 4),
    "cifar_resnet18": (512, 4),
    "cifar_resnet50": (2048, 4),
    "cifar_preact_resnet18": (512, 4),
    "cifar_mobilenetv2": (1280, 2),
    "cifar_shufflenetv1": (960, 4),
    "cifar_shufflenetv2": (1024, 4),
}

# Computed from the classes of mdistiller a08d46f; for cifar_preact_resnet18 of cs-kd b447f25.
PUBLISHED_KEYS = {
    "resnet8x4": "67392e7f5dc443fc",
    "resnet32x4": "d1cdc5857b58d7d5",
    "resnet8": "4c781e512cd685f5",
    "resnet14": "5f23fb935b1739d3",
    "resnet20": "6b9f0272a6f6bace",
    "resnet32": "095172c6c880ccb6",
    "resnet44": "6f43e86f9efa855a",
    "resnet56": "6393373383fefe0d",
    "resnet110": "6f41c9b012d4b0e8",
    "wrn_16_1": "8adc30f7ae18228d",
    "wrn_16_2": "ae5aa50cb9f7c2a1",
    "wrn_40_1": "9f11c1460fb95baf",
    "wrn_40_2": "2a9d2160e1be72dd",
    "cifar_vgg8": "bba81923398e0983",
    "cifar_vgg11": "82df3a294a8a590f",
    "cifar_vgg13": "c80ade34bfeb1ffe",
    "cifar_vgg16": "19ac5dad6e21a6b1",
    "cifar_vgg19": "56c93dfd1a66dbe8",
    "cifar_resnet18": "4777b24df71b39b8",
    "cifar_resnet50": "5924c7eeb130c707",
    "cifar_preact_resnet18": "65594524c4a2c930",
    "cifar_mobilenetv2": "d8a76a010dcabc59",
    "cifar_shufflenetv1": "b908def5e360bd6b",
    "cifar_shufflenetv2": "93732fe0d514eb70",
}
"""The first 16 digits of the SHA-256 of names, order and shapes of a state dict, 100 classes."""


def test_every_network_is_listed_here():
    assert set(CIFAR_NAMES) == set(PUBLISHED_SIZES) == set(MAPS) == set(PUBLISHED_KEYS)


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
    assert (map_BDHW >= 0).all() or name == "cifar_preact_resnet18"
    assert model.num_features == channels
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["pool_size"] == (side, side)
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    pooled = model.forward_head(map_BDHW, pre_logits=True)
    torch.testing.assert_close(pooled, map_BDHW.mean((2, 3)))
    torch.testing.assert_close(model.get_classifier()(pooled), logits)


@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_a_network_has_cells(name, network):
    channels, side = MAPS[name]
    assert check_cells(network(name), 32) == (side, channels, True)


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


@pytest.mark.parametrize(("name", "digest"), PUBLISHED_KEYS.items())
def test_a_state_dict_has_the_names_and_shapes_of_published_checkpoints_in_their_order(
    name, digest
):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=100)
    keys = [[key, list(value.shape)] for key, value in model.state_dict().items()]
    assert hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16] == digest


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
def test_an_activated_block_shortcuts_the_activated_input(in_width, stride):
    block = ActivatedBlock(in_width, 4, stride).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, in_width, 4, 4)
    torch.testing.assert_close(block(x), block.shortcut(relu(block.bn1(x))))


@pytest.mark.parametrize(("in_width", "stride"), [(4, 1), (2, 2)])
def test_a_wide_block_shortcuts_the_raw_input_or_projects_the_activated_one(in_width, stride):
    block = PreActBlock(in_width, 4, stride).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, in_width, 4, 4)
    wanted = x if block.convShortcut is None else block.convShortcut(relu(block.bn1(x)))
    torch.testing.assert_close(block(x), wanted)
