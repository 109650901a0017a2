"""Weights are part of a network's identity wherever it keeps them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from cache_service.errors import UnsupportedError
from cache_service.models.create import create_model
from cache_service.models.weights_digest import hidden_tensors, weights_sha256


class Holder(nn.Module):
    """A network with one registered layer that is the same in all, and something else."""

    def __init__(self, attribute=None, *, registered=True):
        super().__init__()
        self.other = attribute
        if registered:
            self.scale = nn.Parameter(torch.ones(3))


def linear(seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(3, 3)


KEEPS = {
    "plain tensor": lambda seed: torch.full((3, 3), float(seed)),
    "array": lambda seed: np.full((3, 3), float(seed)),
    "list of networks": lambda seed: [linear(seed), linear(seed + 1)],
    "mapping of networks": lambda seed: {"a": linear(seed)},
    "tuple of tensors": lambda seed: (torch.ones(2), torch.full((2,), seed)),
    "nested containers": lambda seed: {"a": [(torch.full((2,), seed),)]},
    "an object with a network": lambda seed: SimpleNamespace(net=linear(seed)),
    "a network with a hidden tensor": lambda seed: [Holder(torch.full((2,), seed))],
}


@pytest.mark.parametrize("keep", KEEPS.values(), ids=KEEPS)
def test_weights_outside_the_state_dict_change_the_digest(keep):
    one, same, other = (Holder(keep(seed)) for seed in (1, 1, 2))
    assert weights_sha256(one) == weights_sha256(same)
    assert weights_sha256(one) != weights_sha256(other)


@pytest.mark.parametrize(
    "keep", [*KEEPS.values(), lambda _seed: object()], ids=[*KEEPS, "nothing at all"]
)
def test_a_network_with_an_empty_state_dict_is_refused_unless_it_names_its_digest(keep):
    one, other = (Holder(keep(seed), registered=False) for seed in (1, 2))
    with pytest.raises(UnsupportedError, match=r"is empty.*attribute weights_digest") as error:
        weights_sha256(one)
    assert "\n" not in str(error.value)
    one.weights_digest, other.weights_digest = "one", "other"
    assert weights_sha256(one) != weights_sha256(other)


def test_parameters_that_a_state_dict_leaves_out_change_the_digest():
    class Partial(nn.Linear):
        def state_dict(self, *args, **options):
            return {"bias": self.bias.detach()}

    one, other = Partial(2, 2), Partial(2, 2)
    other.bias = one.bias
    assert weights_sha256(one) != weights_sha256(other)


def test_names_of_what_is_registered_already_are_no_hidden_weights():
    net = create_model("resnet8x4", num_classes=4, seed=1)
    before = weights_sha256(net)
    net.stages = [net.layer1, net.layer2]
    net.weight_view = net.fc.weight.detach()
    net.register_buffer("mask", torch.ones(2), persistent=False)
    net.masks = {"mask": net.mask}
    assert hidden_tensors(net) == {}
    assert weights_sha256(net) == before


@pytest.mark.parametrize(
    "name", ["resnet8x4", "test_vit", "test_convnext", "levit_128s", "torchvision/resnet18"]
)
def test_published_architectures_have_no_hidden_tensors(name):
    assert hidden_tensors(create_model(name, num_classes=4)) == {}


def test_a_network_names_its_weights_by_an_attribute_or_a_method():
    class Session(nn.Module):
        def __init__(self, content):
            super().__init__()
            self.content = content

        def weights_digest(self):
            return f"sha256 of {self.content}"

    assert weights_sha256(Session("a")) == weights_sha256(Session("a"))
    assert weights_sha256(Session("a")) != weights_sha256(Session("b"))
    named, plain = Holder(), Holder()
    named.weights_digest = "abc"
    assert weights_sha256(named) != weights_sha256(plain)


def test_a_digest_that_is_no_text_is_refused():
    net = Holder()
    net.weights_digest = 5
    with pytest.raises(UnsupportedError, match="weights_digest of Holder is a int, not a string"):
        weights_sha256(net)
