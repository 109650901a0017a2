"""Which parameters are trained, and which decay."""

from __future__ import annotations

import pytest
import torch
from support.streams import normed_net

from cache_service.errors import ConfigError
from distill.optim import SGD, AdamW, make_optimizer, set_learning_rate


def decays(optimizer):
    return {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("kind", [SGD, AdamW])
def test_everything_decays_by_default(kind):
    model = normed_net()
    found = decays(make_optimizer(kind(lr=0.1, weight_decay=0.01), model))
    assert found == {id(parameter): 0.01 for parameter in model.parameters()}


def test_biases_and_norms_are_spared_when_asked():
    model = normed_net()
    found = decays(make_optimizer(SGD(lr=0.1, weight_decay=0.01, no_decay_bias=True), model))
    for name, parameter in model.named_parameters():
        is_kernel = name in {"stem.0.weight", "stem.3.weight", "head.weight"}
        assert found[id(parameter)] == (0.01 if is_kernel else 0.0), name


def test_frozen_parameters_are_left_out():
    model = normed_net()
    model.stem.requires_grad_(False)
    assert len(decays(make_optimizer(SGD(lr=0.1), model))) == 2


def test_a_student_with_nothing_to_train_is_refused():
    with pytest.raises(ConfigError, match="no parameters that can be trained"):
        make_optimizer(SGD(lr=0.1), normed_net().requires_grad_(False))


def test_the_settings_reach_torch():
    sgd = make_optimizer(SGD(lr=0.3, momentum=0.8, nesterov=True), normed_net())
    assert isinstance(sgd, torch.optim.SGD)
    assert (sgd.defaults["lr"], sgd.defaults["momentum"], sgd.defaults["nesterov"]) == (0.3, 0.8, 1)
    adam = make_optimizer(AdamW(lr=0.3, betas=(0.5, 0.6), eps=1e-3), normed_net())
    assert isinstance(adam, torch.optim.AdamW)
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.5, 0.6), 1e-3)


def test_a_learning_rate_is_for_every_group():
    optimizer = make_optimizer(SGD(lr=0.1, no_decay_bias=True), normed_net())
    set_learning_rate(optimizer, 0.7)
    assert [group["lr"] for group in optimizer.param_groups] == [0.7, 0.7]
