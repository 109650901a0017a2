"""Random numbers belong to (seed, step) and to nobody else."""

from __future__ import annotations

import torch

from distill.step import private_random, seed_step

CPU = torch.device("cpu")


def draw(seed, step):
    seed_step(seed, step, CPU)
    return torch.rand(4)


def test_a_step_draws_the_same_whatever_was_drawn_before():
    first = draw(1, 7)
    torch.rand(100)
    assert torch.equal(draw(1, 7), first)


def test_steps_and_seeds_draw_differently():
    pairs = [(seed, step) for seed in (0, 1, 2**31 - 1) for step in (0, 1, 2**32, 2**32 + 1)]
    draws = {tuple(draw(*pair).tolist()) for pair in pairs}
    assert len(draws) == len(pairs)


def test_the_caller_gets_its_generator_back():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    with private_random(CPU):
        draw(1, 1)
    assert torch.equal(torch.rand(2), wanted)
