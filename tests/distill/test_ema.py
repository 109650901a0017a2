"""The average of a student's weights."""

from __future__ import annotations

import torch
from support.streams import normed_net

from distill.students import WeightAverage


def test_it_is_the_running_mean_that_its_formula_says():
    model = normed_net()
    average = WeightAverage(model, 0.9)
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(step + 1.0)
        model.stem[1].running_mean.add_(1.0)
        model.stem[1].num_batches_tracked.add_(1)
        average.update(model)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                wanted[name] = 0.9 * wanted[name] + 0.1 * value
            else:
                wanted[name] = value.clone()
    for name, value in average.model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], msg=name)


def test_it_neither_trains_nor_moves_the_model():
    model = normed_net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    average = WeightAverage(model, 0.9)
    average.update(model)
    assert not average.model.training
    assert not any(parameter.requires_grad for parameter in average.model.parameters())
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_tensor_that_two_layers_share_is_averaged_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    average = WeightAverage(model, 0.5)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    average.update(model)
    torch.testing.assert_close(average.model[0].weight, start + 0.5)
