"""The map of any network is found by measuring, and proven, however the network pools it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.models.features import (
    cell_features,
    cell_logits,
    check_cells,
    linear_head,
    name_map,
)
from cache_service.models.probe import Fed

SIZE, SIDE, WIDTH, CLASSES = 32, 8, 12, 5


class Net(nn.Module):
    """A backbone with batch norm and a shared activation, and a tail of one's own."""

    def __init__(self, tail, *, width=WIDTH, norm=nn.BatchNorm2d):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, padding=1)
        self.body = nn.Conv2d(8, WIDTH, 3, 2, padding=1)
        self.bn = norm(WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.3)
        self.pooled_norm = nn.BatchNorm1d(WIDTH)
        self.classifier = nn.Linear(width, CLASSES)
        self.point = nn.Conv2d(WIDTH, CLASSES, 1)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.last = nn.Identity()
        self.tail = tail

    def forward(self, images):
        features = self.bn(self.body(self.act(self.stem(images))))
        return self.tail(self, features, len(images))


def tokens_of(features):
    return features.flatten(2).transpose(1, 2)


POOLED = {
    "by mean": lambda net, x, n: net.classifier(x.mean((2, 3))),
    "in a function": lambda net, x, n: net.classifier(
        functional.adaptive_avg_pool2d(x, 1).flatten(1)
    ),
    "with a fixed window": lambda net, x, n: net.classifier(
        functional.avg_pool2d(x, 8).view(x.size(0), -1)
    ),
    "viewed by the batch of the images": lambda net, x, n: net.classifier(
        functional.adaptive_avg_pool2d(x, 1).view(n, -1)
    ),
    "with dropout before the classifier": lambda net, x, n: net.classifier(
        net.drop(x.mean((2, 3)))
    ),
    "behind a functional relu": lambda net, x, n: net.classifier(x.relu().mean((2, 3))),
    "behind a functional silu": lambda net, x, n: net.classifier(functional.silu(x).mean((2, 3))),
    "behind a module that runs twice": lambda net, x, n: net.classifier(
        net.act(x).mean((2, 3)).view(n, -1)
    ),
    "with channels last": lambda net, x, n: net.classifier(
        net.last(x.permute(0, 2, 3, 1)).mean((1, 2))
    ),
    "of tokens": lambda net, x, n: net.classifier(net.last(tokens_of(x)).mean(1)),
    "of tokens without the class token": lambda net, x, n: net.classifier(
        net.last(torch.cat([net.token.expand(n, -1, -1), tokens_of(x)], 1))[:, 1:].mean(1)
    ),
    "by a 1 x 1 convolution": lambda net, x, n: net.point(x.mean((2, 3), keepdim=True)).flatten(1),
    "to maps of one pixel": lambda net, x, n: net.point(x.mean((2, 3), keepdim=True)),
}


def network(tail, **settings):
    torch.manual_seed(3)
    net = Net(tail, **settings)
    with torch.no_grad():
        net(torch.randn(8, 3, SIZE, SIZE))  # running statistics that are not 0 and 1
    return net.eval()


def images():
    return torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("tail", POOLED.values(), ids=POOLED)
def test_a_cell_is_the_classifier_on_the_mean_of_its_region(tail):
    net = network(tail)
    assert check_cells(net, SIZE) == (SIDE, WIDTH, True)
    weight_CD, bias_C = linear_head(net, input_size=SIZE)
    with torch.no_grad():
        cells_BRC = cell_logits(net, images(), (1, 2))
        torch.testing.assert_close(cells_BRC[:, 0], net(images()).flatten(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(cells_BRC[:, 1:].mean(1), cells_BRC[:, 0], rtol=1e-4, atol=1e-5)
        upper_left = network(tail)  # the map of the upper left quarter, by the network's own layers
        kept = []
        upper_left.bn.register_forward_hook(lambda _m, _i, out: kept.append(out.clone()))
        upper_left(images())
        finish = functional.silu if "silu" in str(tail.__code__.co_names) else lambda x: x
        if "act" in tail.__code__.co_names or "relu" in tail.__code__.co_names:
            finish = functional.relu
        region = finish(kept[0])[:, :, :4, :4].mean((2, 3))
        torch.testing.assert_close(
            cells_BRC[:, 1], region @ weight_CD.T + bias_C, rtol=1e-4, atol=1e-5
        )
        features_BRD = cell_features(net, images(), (1, 2))
        torch.testing.assert_close(features_BRD[:, 1], region, rtol=1e-4, atol=1e-5)


def test_batch_norm_behind_the_pooling_is_part_of_the_head():
    net = network(lambda net, x, n: net.classifier(net.pooled_norm(x.mean((2, 3)))))
    assert check_cells(net, SIZE).affine
    assert linear_head(net, input_size=SIZE) is None  # the codec `features` stores no norm
    with torch.no_grad():
        torch.testing.assert_close(cell_logits(net, images(), (1, 2))[:, 0], net(images()))


def test_an_activation_behind_the_pooling_makes_a_head_that_is_not_affine():
    net = network(lambda net, x, n: net.classifier(x.mean((2, 3)).relu()), norm=nn.Identity)
    with pytest.raises(UnsupportedError, match="has no cells"):
        check_cells(net, SIZE)  # no module is fed the mean itself
    name_map(net, Fed(SIZE), feature_map="bn", classifier=None)
    assert not check_cells(net, SIZE).affine


NOT_POOLED = {
    "the maximum": lambda net, x, n: net.classifier(x.amax((2, 3))),
    "the class token": lambda net, x, n: net.classifier(
        net.last(torch.cat([net.token.expand(n, -1, -1), tokens_of(x)], 1))[:, 0]
    ),
    "a generalized mean": lambda net, x, n: net.classifier(
        x.clamp_min(1e-6).pow(3).mean((2, 3)).pow(1 / 3)
    ),
    "one pixel": lambda net, x, n: net.classifier(x[:, :, 4, 4]),
    "a weighted mean": lambda net, x, n: net.classifier(
        (x * x.mean(1, keepdim=True).flatten(2).softmax(2).view(n, 1, 8, 8)).sum((2, 3))
    ),
    "mean and maximum": lambda net, x, n: net.classifier(x.mean((2, 3)) + x.amax((2, 3))),
}


@pytest.mark.parametrize("tail", NOT_POOLED.values(), ids=NOT_POOLED)
def test_a_network_that_classifies_something_else_is_refused(tail):
    net = network(tail)
    with pytest.raises(UnsupportedError, match=r"has no cells.*scales: \[1\]") as refusal:
        check_cells(net, SIZE)
    assert "\n" not in str(refusal.value)
    with pytest.raises(UnsupportedError, match=r"with the mean .* answers otherwise"):
        name_map(net, Fed(SIZE), feature_map="bn", classifier=None)


def test_a_mean_that_is_only_a_part_of_the_answer_is_not_enough():
    def tail(net, x, n):
        return net.classifier(x.mean((2, 3))) + x[:, :CLASSES, 0, 0]

    with pytest.raises(UnsupportedError, match="with the mean of the output of bn in place"):
        check_cells(network(tail), SIZE)


def test_a_functional_classifier_needs_the_name_of_the_map():
    def tail(net, x, n):
        return functional.linear(
            functional.normalize(x.mean((2, 3))), functional.normalize(net.classifier.weight)
        )

    net = network(tail)
    with pytest.raises(UnsupportedError, match="its feature map cannot be found"):
        check_cells(net, SIZE)
    name_map(net, Fed(SIZE), feature_map="bn", classifier=None)
    assert not check_cells(net, SIZE).affine
    with torch.no_grad():
        torch.testing.assert_close(cell_logits(net, images(), (1, 2))[:, 0], net(images()))


def test_named_modules_must_exist_and_make_the_map():
    net = network(POOLED["by mean"])
    name_map(net, Fed(SIZE), feature_map="bn", classifier="classifier")
    assert check_cells(net, SIZE).map_side == SIDE
    for names, error, says in (
        ({"feature_map": "bm"}, ConfigError, "has no module 'bm'.*such as bn"),
        ({"classifier": "head"}, ConfigError, "has no module 'head'"),
        ({"feature_map": "act"}, UnsupportedError, r"feature_map act\).*answers otherwise"),
        ({"feature_map": "point"}, UnsupportedError, "does not run exactly once"),
        ({"classifier": "body"}, UnsupportedError, r"classifier body\).*answers otherwise"),
    ):
        given = {"feature_map": None, "classifier": None} | names
        with pytest.raises(error, match=says):
            name_map(network(POOLED["by mean"]), Fed(SIZE), **given)


def test_measuring_leaves_no_hooks_and_no_gradients():
    net = network(POOLED["by mean"])
    check_cells(net, SIZE)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_cells_are_differentiable_and_train_with_dropout():
    net = network(POOLED["viewed by the batch of the images"])
    check_cells(net, SIZE, trains=True)
    net.train()
    cell_logits(net, images(), (1, 2)).square().sum().backward()
    assert float(net.stem.weight.grad.abs().sum()) > 0


def test_a_copy_of_a_measured_network_has_its_map():
    import copy

    net = network(POOLED["by mean"])
    check_cells(net, SIZE)
    with torch.no_grad():
        cells = cell_logits(copy.deepcopy(net), images(), (1, 2))
        torch.testing.assert_close(cells, cell_logits(net, images(), (1, 2)))
