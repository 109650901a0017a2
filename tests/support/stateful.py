"""Augmentation pipelines that cannot be replayed, and some that only look like it."""

from __future__ import annotations

import functools
import itertools
import os
import random
import sys
import time

import numpy as np
import torch

SIZE = 24
EDIT = 0
"""Tests change it to play a pipeline that was edited after a recording."""

SHARED = np.random.default_rng(3)


def _view(level):
    return np.full((SIZE, SIZE, 3), level, np.uint8)


def numpy_closure():
    generator = np.random.default_rng(3)
    return lambda image: _view(generator.integers(256))


def numpy_global():
    return lambda image: _view(SHARED.integers(256))


def legacy_numpy():
    generator = np.random.RandomState(3)
    return lambda image: _view(generator.randint(256))


def python_closure():
    generator = random.Random(3)
    return lambda image: _view(generator.randrange(256))


def torch_closure():
    generator = torch.Generator()
    return lambda image: torch.randint(256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8)


class OfClass:
    generator = random.Random(4)

    def __call__(self, image):
        return _view(self.generator.randrange(256))


def of_class():
    return OfClass()


def rare():
    """Draws from its own generator for every view, and changes one view in a million by it."""
    generator = np.random.RandomState(4)
    return lambda image: _view(7 if generator.rand() < 1e-6 else random.randrange(256))


class Slots:
    __slots__ = ("calls",)

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return _view(self.calls)


def counter():
    return Slots()


def iterator():
    count = itertools.count()
    return lambda image: _view(next(count) % 256)


def generator_function():
    def levels():
        yield from range(256)

    steps = levels()
    return lambda image: _view(next(steps))


class Buffer:
    """Mixes an image with the one before it, as batch-wise pipelines do."""

    previous = None

    def __call__(self, image):
        pixels = np.asarray(image.resize((SIZE, SIZE)))
        other = pixels if self.previous is None else self.previous
        self.previous = pixels
        return pixels // 2 + other // 2


def buffer():
    return Buffer()


def entropy():
    generator = random.SystemRandom()
    return lambda image: _view(generator.randrange(256))


@functools.cache
def _choice():
    return random.randrange(256)


def cached_choice():
    """Keeps the choice of the first view, wherever that is."""
    return lambda image: _view(_choice())


class Lazy:
    """An object that computes attributes, and fails."""

    @property
    def __dict__(self):
        raise RuntimeError("not loaded")

    def __call__(self, image):
        return _view(random.randrange(256))


def lazy():
    return Lazy()


class OfType:
    calls = 0

    def __call__(self, image):
        type(self).calls += 1
        return _view(self.calls)


def of_type():
    return OfType()


def unseeded():
    return lambda image: _view(np.random.default_rng().integers(256))


def clock():
    return lambda image: _view(time.time_ns() % 256)


def hashed():
    # One color channel alone would be the same in two processes of 256.
    return lambda image: _view([hash(text) % 256 for text in ("red", "green", "blue")])


class Reseeded:
    """Keeps a generator, and has the method by which it is seeded for each view."""

    def set_random_seed(self, seed):
        self.generator = random.Random(seed)

    def __call__(self, image):
        return _view(self.generator.randrange(256))


def reseeded():
    return Reseeded()


class Remembers:
    """Keeps a generator that no view draws from, and what it did last."""

    def __init__(self):
        self.unused = random.Random(4)
        self.last = None

    def __call__(self, image):
        self.last = random.randrange(256)
        return _view((self.last + EDIT) % 256)


def remembers():
    return Remembers()


def paints():
    """Paints on the image that it is given."""

    def pipeline(image):
        image.paste((random.randrange(256), 0, 0), (0, 0, 4, 4))
        return image.resize((SIZE, SIZE))

    return pipeline


def ends():
    """Works in the process of the tests only."""
    if "pytest" not in sys.modules:
        os._exit(9)
    return lambda image: _view(1)


def raises():
    return lambda image: {}["id"]


def does_not_open():
    return list[int]()[3]
