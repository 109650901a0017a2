"""The paper's networks: their sizes, and the bound on incoming weights whoever trains them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, linear, relu

from cache_service.errors import ConfigError
from cache_service.models.create import create_model
from cli.experiments.reproduce.networks import MaxNormLinear, mlp

MAX_NORM = 0.5


def norms(model):
    layers = [layer for layer in model.modules() if isinstance(layer, MaxNormLinear)]
    assert layers
    return torch.cat([layer.weight.detach().norm(dim=1) for layer in layers])


def take_steps(model, count=3):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    images, labels = torch.rand(32, 3, 28, 28), torch.arange(32) % 10
    for _ in range(count):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()


def test_the_students_are_two_layers_of_800_and_linear_maps_with_relu_between():
    model = mlp().eval()
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [(800, 784), (800, 800), (10, 800)]
    images = torch.rand(4, 1, 28, 28).expand(4, 3, 28, 28)
    weights = list(model.parameters())
    hidden = images[:, 0].reshape(4, -1)
    for weight, bias in zip(weights[0:4:2], weights[1:4:2], strict=True):
        hidden = relu(linear(hidden, weight, bias))
    torch.testing.assert_close(model(images), linear(hidden, *weights[4:]))


def test_an_update_takes_weights_over_the_norm_and_the_next_use_brings_them_back():
    model = mlp(hidden=(20, 20), max_norm=MAX_NORM)
    take_steps(model)
    assert norms(model).max() > MAX_NORM * 1.01  # else this test shows nothing
    model(torch.rand(2, 3, 28, 28))
    assert norms(model).max() <= MAX_NORM * 1.0001


def test_saved_weights_are_within_the_norm():
    model = mlp(hidden=(20, 20), max_norm=MAX_NORM)
    take_steps(model)
    state = model.state_dict()
    weights = [value for value in state.values() if value.ndim == 2]
    assert max(weight.norm(dim=1).max() for weight in weights) <= MAX_NORM * 1.0001


def test_weights_within_the_norm_are_left_alone():
    layer = MaxNormLinear(6, 3, max_norm=10.0)
    before = layer.weight.detach().clone()
    layer(torch.rand(2, 6))
    assert torch.equal(before, layer.weight)


def test_a_row_that_is_too_long_keeps_its_direction():
    layer = MaxNormLinear(6, 3, max_norm=MAX_NORM)
    with torch.no_grad():
        layer.weight.mul_(100)
    direction = layer.weight.detach() / layer.weight.detach().norm(dim=1, keepdim=True)
    layer.project()
    torch.testing.assert_close(layer.weight.detach() / MAX_NORM, direction)


def test_dropout_is_off_by_default_and_takes_pixels_and_units_when_asked():
    images = torch.rand(2, 3, 28, 28)
    plain = mlp(hidden=(20,)).train()
    assert torch.equal(plain(images), plain(images))
    for setting in ("drop_input", "drop_hidden"):
        dropped = mlp(hidden=(20,), **{setting: 0.5}).train()
        assert not torch.equal(dropped(images), dropped(images))
        dropped.eval()
        assert torch.equal(dropped(images), dropped(images))


def test_a_norm_of_nothing_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="max_norm must be above 0, got 0"):
        create_model("cli.experiments.reproduce.networks:mlp", num_classes=10, max_norm=0)
