from __future__ import annotations

import pytest
import torch
from torch import nn

from cache_service.errors import UnsupportedError
from cache_service.models.features import cell_logits, check_cells, linear_head
from cache_service.models.zoo import CIFAR_NAMES

SMALL_VIT = {"img_size": 64, "depth": 2}
SMALL_SWIN = {"img_size": 64, "depths": (1, 1, 1, 1)}

# name, model arguments, input size, map side, channels, affine, linear
SUPPORTED = [
    ("resnet10t", {}, 64, 2, 512, True, True),
    ("convnext_atto", {}, 64, 2, 320, False, False),
    ("efficientnet_b0", {}, 64, 2, 1280, True, True),
    ("regnetx_002", {}, 64, 2, 368, True, True),
    ("mobilenetv1_100", {}, 64, 2, 1024, True, True),
    ("mobilenetv2_050", {}, 64, 2, 1280, True, True),
    ("mobilenetv3_small_050", {}, 64, 2, 288, False, False),
    ("densenet121", {}, 64, 2, 1024, True, True),
    ("hrnet_w18_small", {}, 64, 2, 2048, True, True),
    ("mobilevit_xxs", {}, 64, 2, 320, True, True),
    ("resnetv2_50", {"layers": (1, 1, 1, 1)}, 64, 2, 2048, True, True),  # 1x1 convolution
    ("levit_128s", {}, 224, 4, 384, True, False),  # a batch norm in the classifier
    ("swin_tiny_patch4_window7_224", SMALL_SWIN, 64, 2, 768, True, True),
    ("vit_tiny_patch16_224", SMALL_VIT | {"global_pool": "avg"}, 64, 4, 192, False, False),
    (
        "vit_tiny_patch16_224",
        SMALL_VIT | {"global_pool": "avg", "class_token": False, "fc_norm": False},
        64,
        4,
        192,
        True,
        True,
    ),
    ("torchvision/resnet18", {}, 64, 2, 512, True, True),
    ("torchvision/mobilenet_v2", {}, 64, 2, 1280, True, True),
    ("torchvision/mobilenet_v3_small", {}, 64, 2, 576, False, False),
    ("torchvision/efficientnet_b0", {}, 64, 2, 1280, True, True),
    ("torchvision/convnext_tiny", {}, 64, 2, 768, False, False),
    ("torchvision/regnet_x_400mf", {}, 64, 2, 400, True, True),
    ("torchvision/shufflenet_v2_x0_5", {}, 64, 2, 1024, True, True),
    ("torchvision/densenet121", {}, 64, 2, 1024, True, True),
    ("torchvision/mnasnet0_5", {}, 64, 2, 1280, True, True),
    ("torchvision/squeezenet1_1", {}, 64, 3, 11, True, False),  # the map is the logits
    ("torchvision/swin_t", {}, 64, 2, 768, True, True),
    *[(name, {}, 32, None, None, True, True) for name in CIFAR_NAMES],
]

REFUSED = [
    ("vit_tiny_patch16_224", SMALL_VIT, "vit_tiny_patch16_224 .* class token"),
    ("vit_tiny_patch16_224", SMALL_VIT | {"global_pool": "map"}, "more than pooling"),
    ("deit_tiny_distilled_patch16_224", SMALL_VIT, "class token"),
    ("vgg11", {"mlp_ratio": 0.01}, "vgg11 .* more than pooling and a classifier"),
    ("resnet10t", {"global_pool": "max"}, "resnet10t .* more than pooling"),
    ("torchvision/alexnet", {}, "its feature map cannot be found"),
    ("torchvision/vit_b_32", {"image_size": 64}, "its feature map cannot be found"),
]


class Foreign(nn.Sequential):
    """A network of another house: one pooling layer, by any name, behind a rectified map."""

    def __init__(self, *, bias=True):
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(8, 4, bias=bias))


@pytest.mark.parametrize(
    ("name", "options", "size", "side", "channels", "affine", "is_linear"), SUPPORTED
)
def test_cell_0_is_the_networks_own_answer(
    name, options, size, side, channels, affine, is_linear, network, images
):
    model = network(name, **options)
    support = check_cells(model, size)
    if side is not None:
        assert support == (side, channels, affine)
    assert (support.affine, linear_head(model) is not None) == (affine, is_linear)
    with torch.no_grad():
        own, cells = model(images(size)), cell_logits(model, images(size), (1, 2))
    assert cells.shape == (2, 5, 11)
    # Relative to the largest logit: untrained networks answer from 1e-9 to 1e8.
    torch.testing.assert_close(
        cells[:, 0] / own.abs().max(), own / own.abs().max(), rtol=0, atol=1e-5
    )
    nested = support.map_side % 2 == 0
    if affine and nested:
        apart = (cells[:, 1:].mean(1) - own).abs().max() / own.abs().max()
        assert apart < 1e-5


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED)
def test_a_network_without_cells_is_refused_with_its_reason(name, options, reason, network):
    with pytest.raises(UnsupportedError, match=rf"{reason}.*Ask for scales: \[1\]"):
        check_cells(network(name, **options), 64)


def test_a_classifier_of_zeros_hides_neither_a_class_token_nor_a_norm(network):
    by_token = network("vit_tiny_patch16_224", **SMALL_VIT)
    with_norm = network("convnext_atto")
    for model in (by_token, with_norm):
        nn.init.zeros_(model.get_classifier().weight)
    with pytest.raises(UnsupportedError, match="class token"):
        check_cells(by_token, 64)
    assert not check_cells(with_norm, 64).affine
    assert linear_head(with_norm) is None


def test_a_network_of_the_wrong_size_says_so(network):
    with pytest.raises(UnsupportedError, match=r"cannot be fed 64 x 64 px images: .*224"):
        check_cells(network("vit_tiny_patch16_224", depth=1), 64)


def test_numbers_that_are_not_finite_are_refused(network):
    model = network("resnet8x4")
    nn.init.constant_(model.fc.bias, float("nan"))
    with pytest.raises(UnsupportedError, match="not finite"):
        check_cells(model, 32)


def test_probing_leaves_modes_weights_and_randomness_alone(network):
    model = network("resnet8x4").train()
    model.bn1.eval()
    modes = [module.training for module in model.modules()]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_cells(model, 32)
    linear_head(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def test_a_refused_network_gets_its_modes_back(network):
    model = network("resnet10t", global_pool="max").train()
    with pytest.raises(UnsupportedError, match="has no cells"):
        check_cells(model, 64)
    assert all(module.training for module in model.modules())


def test_a_network_that_pools_in_one_module_needs_no_convention():
    support = check_cells(Foreign(), 16)
    assert (support.map_side, support.num_channels, support.affine) == (14, 8, True)
    weight_CD, bias_C = linear_head(Foreign(bias=False))
    assert weight_CD.shape == (4, 8)
    assert bias_C.tolist() == [0, 0, 0, 0]


def test_half_precision_weights_can_be_probed(network):
    model = network("resnet8x4").bfloat16()
    assert check_cells(model, 32).affine
    assert linear_head(model) is not None
    assert not check_cells(network("convnext_atto").bfloat16(), 64).affine
