"""Slow references for every loss: Python floats, one element at a time, from the formulas."""

from __future__ import annotations

import math

import pytest
import torch


class Direct:
    """The few functions that the formulas are written in. Rows are lists of floats."""

    @staticmethod
    def softmax(row, temperature=1.0):
        top = max(row)
        weights = [math.exp((z - top) / temperature) for z in row]
        return [w / math.fsum(weights) for w in weights]

    @staticmethod
    def kl(p, q):
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    @staticmethod
    def cross_entropy(p, q):
        return -math.fsum(a * math.log(b) for a, b in zip(p, q, strict=True) if a > 0)

    @staticmethod
    def mean(values):
        values = list(values)
        return math.fsum(values) / len(values)

    @staticmethod
    def without(row, index):
        return [value for place, value in enumerate(row) if place != index]

    @classmethod
    def kd(cls, student, teacher, temperature):
        p = cls.softmax(teacher, temperature)
        return temperature**2 * cls.kl(p, cls.softmax(student, temperature))

    @classmethod
    def dkd(cls, student, teacher, label, temperature, alpha, beta):
        p, q = cls.softmax(teacher, temperature), cls.softmax(student, temperature)
        rest_p, rest_q = (
            [value / math.fsum(cls.without(row, label)) for value in cls.without(row, label)]
            for row in (p, q)
        )
        two_p, two_q = ([row[label], math.fsum(cls.without(row, label))] for row in (p, q))
        return temperature**2 * (alpha * cls.kl(two_p, two_q) + beta * cls.kl(rest_p, rest_q))

    @classmethod
    def nkd(cls, student, teacher, label, temperature, gamma, classes):
        target = -cls.softmax(teacher)[label] * math.log(cls.softmax(student)[label])
        if classes == "others":
            student, teacher = cls.without(student, label), cls.without(teacher, label)
        p, q = cls.softmax(teacher, temperature), cls.softmax(student, temperature)
        return target + gamma * temperature**2 * cls.cross_entropy(p, q)

    @classmethod
    def pearson(cls, a, b):
        a = [value - cls.mean(a) for value in a]
        b = [value - cls.mean(b) for value in b]
        norms = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
        return math.fsum(x * y for x, y in zip(a, b, strict=True)) / (norms + 1e-8)


@pytest.fixture(scope="session")
def direct():
    return Direct


@pytest.fixture(scope="session")
def draw_logits():
    def draw(seed, *shape, scale=3.0):
        generator = torch.Generator().manual_seed(seed)
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw


@pytest.fixture(scope="session")
def draw_labels():
    def draw(seed, *shape, num_classes):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, num_classes, shape, generator=generator)

    return draw
