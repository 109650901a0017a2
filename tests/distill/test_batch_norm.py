"""Batch norms of several ranks are those of one process over all their views, however divided."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from support.ranks import run_ranks
from torch import distributed, nn
from torch.nn.functional import cross_entropy

from cache_service.models.create import create_model
from distill.batches import BatchPlan
from distill.ranks import JoinedRanks

CPU = torch.device("cpu")
NORMS = {
    "2d": lambda: nn.BatchNorm2d(3),
    "1d": lambda: nn.BatchNorm1d(3),
    "3d": lambda: nn.BatchNorm3d(3),
    "plain": lambda: nn.BatchNorm2d(3, affine=False),
    "untracked": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "average": lambda: nn.BatchNorm2d(3, momentum=None),
    "timm": lambda: timm_norm(3),
    "frozen": lambda: nn.BatchNorm2d(3).eval(),
}
SHAPES = {"1d": (14, 3), "3d": (14, 3, 2, 3, 2)}
NUM_VIEWS = 14


def timm_norm(channels):
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(channels)


def outcome(norm, values_BCX, grads_BCX, context):
    """The output of two passes, its gradients, and what the norm keeps."""
    values_BCX = values_BCX.clone().requires_grad_()
    with context():
        norm(values_BCX.detach() * 3 + 1)
        result = norm(values_BCX)
    result.backward(grads_BCX)
    gradients = [parameter.grad for parameter in norm.parameters()]
    return result.detach(), values_BCX.grad, gradients, list(norm.buffers())


def compare(name, dtype):
    """Largest differences of this rank's results from those over the whole batch."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = JoinedRanks(CPU, 60)
    plan = BatchPlan(NUM_VIEWS, NUM_VIEWS, (0,), 1, ranks.rank, ranks.world)
    own = slice(*plan.cursor(0)[3:])
    shape = SHAPES.get(name, (NUM_VIEWS, 3, 4, 4))
    draw = torch.Generator().manual_seed(3)
    values, grads = (torch.randn(shape, generator=draw).to(dtype) + 5 for _ in range(2))
    whole, divided = NORMS[name](), NORMS[name]()
    for norm in (whole, divided):
        for number, parameter in enumerate(norm.parameters()):
            nn.init.constant_(parameter, number + 0.5)
        norm.to(torch.promote_types(dtype, torch.float32))
    expected = outcome(whole, values, grads, torch.enable_grad)
    division = ranks.division(plan, 0)
    found = outcome(divided, values[own], grads[own], division.statistics)
    found_sums = [None if each is None else ranks.sum_over_ranks(each) for each in found[2]]
    pairs = [
        (found[0], expected[0][own]),
        (found[1], expected[1][own]),
        *zip(found_sums, expected[2], strict=True),
        *zip(found[3], expected[3], strict=True),
    ]
    return [float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs]


@pytest.mark.parametrize("name", NORMS)
def test_a_batch_norm_sees_the_views_of_all_ranks(name):
    for differences in run_ranks(3, compare, name, torch.float64):
        assert max(differences) < 1e-12


def test_half_precision_is_widened_for_the_statistics():
    for differences in run_ranks(2, compare, "2d", torch.bfloat16):
        assert max(differences) < 2e-2


def deep_gradients():
    """Largest relative difference of the gradients of a deep network from those of one process."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = JoinedRanks(CPU, 60)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, 32, 32, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 10, (10,), generator=draw)
    plan = BatchPlan(10, 10, (0,), 1, ranks.rank, ranks.world)
    own, division = slice(*plan.cursor(0)[3:]), ranks.division(plan, 0)
    whole, divided = (
        create_model("resnet20", num_classes=10, pretrained=False, seed=0).double().train()
        for _ in range(2)
    )
    cross_entropy(whole(images), labels).backward()
    with division.statistics():
        loss = cross_entropy(divided(images[own]), labels[own], reduction="sum") / 10
    loss.backward()
    ranks.add_up(divided.parameters(), torch.zeros(1))
    pairs = zip(divided.parameters(), whole.parameters(), strict=True)
    return max(float((one.grad - other.grad).norm() / other.grad.norm()) for one, other in pairs)


def test_gradients_through_many_batch_norms_are_those_of_one_process():
    assert max(run_ranks(2, deep_gradients)) < 1e-10


def add_up():
    """Gradients after the exchange: of all ranks, of one rank only, of none; and some values."""
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    ranks = JoinedRanks(CPU, 60)
    both, one, none, constant = (nn.Parameter(torch.ones(2, 2)) for _ in range(4))
    constant.requires_grad_(False)
    both.grad = torch.full((2, 2), ranks.rank + 1.0)
    if ranks.rank == 1:
        one.grad = torch.full((2, 2), 7.0)
    values = ranks.add_up([both, one, none, constant], torch.tensor([1.0, ranks.rank]))
    gradients = [each.grad for each in (both, one, none, constant)]
    return [None if each is None else each.tolist() for each in gradients], values.tolist()


def test_a_gradient_that_one_rank_has_is_that_of_all_and_none_stays_none():
    for gradients, values in run_ranks(2, add_up):
        assert gradients[:2] == [[[3.0, 3.0]] * 2, [[7.0, 7.0]] * 2]
        assert gradients[2:] == [None, None]  # no weight decay moves what has no gradient
        assert values == [2.0, 1.0]
