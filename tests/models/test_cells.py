from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from cache_service.errors import UnsupportedError
from cache_service.models.features import (
    cell_features,
    cell_logits,
    check_cells,
    linear_head,
    pool_cells,
)

SMALL_VIT = {"img_size": 64, "depth": 2, "global_pool": "avg"}


class Several(nn.Module):
    """A network with two answers."""

    def forward(self, x):
        return x.mean((2, 3)), x.mean((2, 3))


def test_a_cell_is_the_head_on_the_mean_of_its_region(network, images):
    model = network("resnet8x4")
    with torch.no_grad():
        map_BDHW = model.forward_features(images(32))
        cells = cell_logits(model, images(32), (1, 2, 4))
        lower_left = model.forward_head(map_BDHW[:, :, 4:, :4])
        last_of_16 = model.forward_head(map_BDHW[:, :, 6:, 6:])
    assert cells.shape == (2, 21, 11)
    torch.testing.assert_close(cells[:, 3], lower_left)
    torch.testing.assert_close(cells[:, 20], last_of_16)


def test_a_cell_of_a_channels_last_map_is_its_region(network, images):
    model = network("swin_tiny_patch4_window7_224", img_size=64, depths=(1, 1, 1, 1))
    with torch.no_grad():
        upper_right = model.forward_head(model.forward_features(images(64))[:, :1, 1:])
        cells = cell_logits(model, images(64), (1, 2))
    torch.testing.assert_close(cells[:, 2], upper_right)


def test_a_cell_of_a_token_map_is_its_region_without_the_prefix(network, images):
    model = network("vit_tiny_patch16_224", **SMALL_VIT)
    with torch.no_grad():
        tokens = model.forward_features(images(64))
        grid = tokens[:, 1:].reshape(2, 4, 4, -1)
        upper_right = torch.cat([tokens[:, :1], grid[:, :2, 2:].flatten(1, 2)], dim=1)
        cells = cell_logits(model, images(64), (2,))
        torch.testing.assert_close(cells[:, 1], model.forward_head(upper_right))


def test_both_ways_to_cut_a_network_agree_to_the_gradient(network, images):
    by_name, by_hook = network("resnet18"), network("torchvision/resnet18")
    by_hook.load_state_dict(by_name.state_dict())
    answers = []
    for model in (by_name, by_hook):
        cells = cell_logits(model, images(64), (1, 2))
        cells.square().sum().backward()
        answers.append((cells.detach(), model.conv1.weight.grad, model.fc.weight.grad))
    assert by_name.conv1.weight.grad.abs().max() > 0
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet8x4", "torchvision/shufflenet_v2_x0_5"])
@pytest.mark.parametrize("scales", [(1,), (4,), (1, 2, 4)])
def test_the_backbone_runs_once_whatever_the_scales(name, scales, network, images):
    model, rows = network(name), []
    check_cells(model, 32)  # finding the map takes runs of its own
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    first.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    with torch.no_grad():
        cell_logits(model, images(32), scales)
    assert rows == [2]


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("vit_tiny_patch16_224", 64, {"img_size": 64, "depth": 2}),
        ("deit_tiny_distilled_patch16_224", 64, {"img_size": 64, "depth": 2}),
        ("torchvision/alexnet", 64, {}),
    ],
)
def test_any_network_has_the_whole_image_as_a_cell(name, size, options, network, images):
    model = network(name, **options)
    with torch.no_grad():
        cells = cell_logits(model, images(size), (1,))
        torch.testing.assert_close(cells, model(images(size))[:, None], rtol=0, atol=0)


@pytest.mark.parametrize("scales", [(1,), (1, 2)])
def test_several_answers_are_refused(scales, images):
    with pytest.raises(UnsupportedError, match="Several"):
        cell_logits(Several(), images(8), scales)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("resnet8x4", "8 x 16"),
        ("torchvision/resnet18", "1 x 2"),
        ("vit_tiny_patch16_224", "16 tokens"),
    ],
)
def test_a_map_that_is_not_square_is_refused_with_its_sides(name, found, network, images):
    options = {"img_size": (32, 128), "depth": 1, "global_pool": "avg"} if "vit" in name else {}
    size = (32, 128) if "vit" in name else (32, 64)
    with pytest.raises(
        UnsupportedError, match=f"that of .* is {found} for {size[0]} x {size[1]} px"
    ):
        cell_logits(network(name, **options), images(*size), (1, 2))


def test_a_hooked_network_is_left_as_it_was(network, images):
    model = network("torchvision/resnet18")
    with torch.no_grad():
        before = model(images(32))
        cell_logits(model, images(32), (1, 2))
        with pytest.raises(UnsupportedError, match="cells need a square feature map"):
            cell_logits(model, images(32, 64), (1, 2))
        torch.testing.assert_close(model(images(32)), before, rtol=0, atol=0)
    assert not any(module._forward_hooks for module in model.modules())


def test_threads_may_share_a_hooked_network(network, images):
    model, wrong = network("torchvision/mobilenet_v3_small"), []
    with torch.no_grad():
        wanted = {scales: cell_logits(model, images(32), scales) for scales in [(1,), (2,), (1, 4)]}

    def ask(scales):
        for _ in range(10):
            with torch.no_grad():
                found = cell_logits(model, images(32), scales)
            if found.shape != wanted[scales].shape or not torch.allclose(found, wanted[scales]):
                wrong.append(scales)

    threads = [threading.Thread(target=ask, args=(scales,)) for scales in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["resnet8x4", "torchvision/resnet18", "convnext_atto"])
def test_half_precision_and_channels_last_give_the_networks_own_answer(name, network, images):
    model = network(name).to(memory_format=torch.channels_last)
    x = images(64).to(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cells, own = cell_logits(model, x, (1, 2, 4)), model(x)
    assert cells.dtype == own.dtype == torch.bfloat16
    torch.testing.assert_close(cells[:, 0], own)


@pytest.mark.parametrize("name", ["cifar_shufflenetv2", "torchvision/densenet121", "mobilevit_xxs"])
def test_features_and_the_linear_head_give_the_logits(name, network, images):
    model = network(name)
    weight_CD, bias_C = linear_head(model)
    with torch.no_grad():
        features = cell_features(model, images(64), (1, 2))
        cells = cell_logits(model, images(64), (1, 2))
    torch.testing.assert_close(features @ weight_CD.T + bias_C, cells, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["direct", "chained"])
def test_the_map_is_pooled_as_asked(pooling, network, images):
    model = network("resnet8x4")
    with torch.no_grad():
        map_BDHW = model.forward_features(images(28))  # side 7, which 2 does not divide
        wanted = pool_cells(map_BDHW, (1, 2), pooling=pooling)
        features = cell_features(model, images(28), (1, 2), pooling=pooling)
        cells = cell_logits(model, images(28), (1, 2), pooling=pooling)
    torch.testing.assert_close(features, wanted)
    torch.testing.assert_close(cells, model.fc(wanted))
