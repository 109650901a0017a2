"""Specialists around a generalist: chosen by its confusions, trained, and combined."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.builds import record_toy
from support.confusable import GROUPS
from support.streams import train_config

from cache_service.errors import ConfigError
from distill import load_cache
from distill.config import EvaluateConfig
from distill.evaluate import HeldOut
from distill.losses import combine_specialists, dustbin_logits
from distill.specialists import (
    Specialist,
    combine,
    confusable_subsets,
    evaluate_together,
    open_answer,
    open_specialist,
    prediction_covariance,
)
from distill.stream import open_stream
from distill.trainer import train


def planted(groups, num_classes, *, noise=0.0):
    """A covariance in which the classes of a group go together."""
    covariance = 0.02 * torch.eye(num_classes, dtype=torch.float64)
    for group in groups:
        for one, other in itertools.permutations(group, 2):
            covariance[one, other] = 0.015
    drawn = torch.randn(num_classes, num_classes, generator=torch.Generator().manual_seed(0))
    return covariance + noise * (drawn + drawn.T)


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_classes_that_are_predicted_together_are_one_subset(noise):
    groups = [(0, 7, 9), (1, 2), (3, 4, 5, 8)]
    found = confusable_subsets(planted(groups, 10, noise=noise), num_subsets=4)
    assert found == groups  # class 6 is confused with no other class


def test_subsets_are_the_same_in_every_run_and_cover_each_class_once():
    covariance = torch.randn(30, 30, generator=torch.Generator().manual_seed(1))
    covariance = covariance @ covariance.T
    found = confusable_subsets(covariance, num_subsets=6, seed=4)
    assert found == confusable_subsets(covariance, num_subsets=6, seed=4)
    classes = [c for subset in found for c in subset]
    assert len(set(classes)) == len(classes)
    assert all(len(subset) > 1 for subset in found)


def sum_of_squares(rows, labels):
    return sum(
        ((rows[labels == k] - rows[labels == k].mean(0)) ** 2).sum() for k in np.unique(labels)
    )


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_clusters_are_those_that_brute_force_finds(seed):
    rows = np.random.default_rng(seed).normal(size=(6, 6))
    best = min(
        (sum_of_squares(rows, np.array(labels)), labels)
        for labels in itertools.product(range(2), repeat=6)
        if len(set(labels)) == 2
    )
    wanted = sorted(
        subset for k in range(2) if len(subset := tuple(c for c in range(6) if best[1][c] == k)) > 1
    )
    assert confusable_subsets(torch.from_numpy(rows.T), num_subsets=2, restarts=40) == wanted


def test_as_many_subsets_as_classes_are_all_of_one_class():
    assert confusable_subsets(planted([(0, 1)], 4), num_subsets=4) == []
    assert confusable_subsets(torch.zeros(4, 4), num_subsets=1) == [(0, 1, 2, 3)]
    assert confusable_subsets(torch.zeros(4, 4), num_subsets=3) == [(0, 1, 2, 3)]


@pytest.mark.parametrize("num_subsets", [0, 5])
def test_more_subsets_than_classes_are_refused(num_subsets):
    with pytest.raises(ConfigError, match=f"num_subsets={num_subsets} of 4 classes"):
        confusable_subsets(planted([(0, 1)], 4), num_subsets=num_subsets)


def draw(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_combination_is_that_of_the_corrected_specialists():
    generalist, (one, other) = draw(0, 5, 6), (draw(1, 5, 6), draw(2, 5, 6))
    members = [Specialist(None, (0, 2), 3.0), Specialist(None, (1, 4, 5), 1.0)]
    found, active = combine(generalist, [one, other], members)
    likeliest = generalist.argmax(-1).tolist()
    assert active.tolist() == [[c in each.classes for each in members] for c in likeliest]
    p_one = one.double().softmax(-1)
    # The odds of the subset against the rest are three times too high.
    inside = p_one[:, [0, 2]] / 3.0
    rest = p_one[:, [1, 3, 4, 5]].sum(-1, keepdim=True)
    whole = torch.cat([inside, rest], -1)
    subset = torch.tensor([1, 4, 5])
    wanted = combine_specialists(
        generalist.double().softmax(-1),
        [whole / whole.sum(-1, keepdim=True), dustbin_logits(other.double(), subset).softmax(-1)],
        [torch.tensor([0, 2]), subset],
        active_BM=active,
    )
    torch.testing.assert_close(found, wanted.q_BC, rtol=1e-3, atol=1e-5)


def test_specialists_that_agree_with_the_generalist_change_nothing():
    generalist = draw(0, 5, 6)
    members = [Specialist(None, (0, 2)), Specialist(None, (1, 4, 5))]
    found, _ = combine(generalist, [generalist, generalist], members)
    torch.testing.assert_close(found, generalist.double().softmax(-1), rtol=1e-4, atol=1e-6)


def test_without_specialists_the_generalist_is_unchanged():
    found, active = combine(draw(0, 5, 6), [], [])
    torch.testing.assert_close(found, draw(0, 5, 6).double().softmax(-1))
    assert active.shape == (5, 0)


DATA = {"name": "support.confusable:groups", "args": {"num_samples": 300}}
VIEWS = {"preset": "none", "size": 8}


class Trained(NamedTuple):
    """A generalist too narrow for all classes, its cache, and its specialists."""

    folder: object
    cache: str

    def config(self, out, **changes):
        return train_config(
            self.folder / out,
            dataset=DATA,
            student={"model": "support.confusable:narrow"} | changes.pop("student", {}),
            optimizer={"name": "sgd", "lr": 0.005, "momentum": 0.9},
            epochs=6,
            batch_size=10,
            log_every=1000,
            checkpoint_every={"epochs": 6},
            **changes,
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("specialists")
    made = Trained(folder, str(folder / "cache"))
    train(made.config("generalist", method={"name": "ce"}, caches=[], augment=VIEWS))
    weights = str(folder / "generalist" / "student.safetensors")
    half = {"mean": [0.5] * 3, "std": [0.5] * 3}
    teacher = {"model": "support.confusable:narrow", "checkpoint": weights, **half}
    record_toy(made.cache, dataset=DATA, augment=VIEWS, seeds="0:1", scales=[1], teacher=teacher)
    for index, classes in enumerate(GROUPS):
        method = {"name": "specialist", "classes": classes, "temperature": 2, "alpha": 0.3}
        train(
            made.config(
                f"specialist{index}",
                method=method,
                caches=made.cache,
                student={"checkpoint": weights},
            )
        )
    return made


@pytest.fixture
def held_out():
    data = {"name": "support.confusable:groups", "args": {"num_samples": 400, "salt": 1}}
    return HeldOut(
        EvaluateConfig(dataset=data), num_classes=6, view_size=8, batch_size=200, workers=0
    )


def test_the_generalists_confusions_are_found_in_its_cache(trained):
    covariance = prediction_covariance(load_cache(trained.cache))
    assert confusable_subsets(covariance, num_subsets=3) == sorted(GROUPS)


def test_the_covariance_is_that_of_all_recorded_probabilities(trained):
    cache = load_cache(trained.cache)
    logits = cache.read(0, 0, 300)["logits"][:, 0].astype(np.float64)
    for temperature in (1.0, 3.0):
        p = np.exp(logits / temperature)
        p /= p.sum(-1, keepdims=True)
        wanted = np.cov(p.T, bias=True)
        found = prediction_covariance(cache, seeds=[0], temperature=temperature).numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-9)


def test_specialists_are_better_on_their_classes_and_so_are_all_together(trained, held_out):
    """Slower than others: four networks are trained and one is recorded, once for this file."""
    members = [open_specialist(trained.folder / f"specialist{index}") for index in range(3)]
    found = evaluate_together(held_out, open_answer(trained.folder / "generalist"), members)
    assert found.combined.top1 > found.generalist.top1 + 0.05
    assert found.combined.nll < found.generalist.nll
    assert all(together.top1 > alone.top1 for alone, together in found.members)
    # The subsets are disjoint and cover all classes, so one specialist is active for every view.
    assert sum(found.active) == pytest.approx(1.0)


def test_a_specialists_checkpoint_has_its_classes_and_their_oversampling(trained):
    found = open_specialist(trained.folder / "specialist1")
    labels = np.random.default_rng(0).integers(0, 6, 300)
    special = np.isin(labels, GROUPS[1]).sum()
    assert found.classes == GROUPS[1]
    assert found.oversampling == (300 - special) / special


def test_without_specialists_both_scores_are_the_generalists(trained, held_out):
    found = evaluate_together(held_out, open_answer(trained.folder / "generalist"), [])
    assert found.combined.top1 == found.generalist.top1
    assert found.combined.nll == pytest.approx(found.generalist.nll, abs=1e-6)


def test_a_cache_gives_the_scores_of_the_network_that_recorded_it(trained):
    config = trained.config("unused", method={"name": "ce"}, caches=trained.cache)
    stream = open_stream(config, device=torch.device("cpu"))
    batches = [batch for batch in stream.batches(0) if batch.cursor.epoch == 0]
    specialist = open_specialist(trained.folder / "specialist0")

    def recorded(batch):
        return stream.teacher_logits(batch, temperature=1.0, cache=0)[:, 0]

    network = open_answer(trained.folder / "generalist")
    by_cache, by_network = (
        evaluate_together(batches, generalist, [specialist]) for generalist in (recorded, network)
    )
    assert by_cache.combined.nll == pytest.approx(by_network.combined.nll, abs=1e-3)
    assert by_cache.generalist.num_samples == 300


def test_other_checkpoints_are_refused_as_specialists(trained, tmp_path):
    with pytest.raises(ConfigError, match="trained by method ce, not as a specialist"):
        open_specialist(trained.folder / "generalist")
    with pytest.raises(ConfigError, match="no checkpoint at"):
        open_specialist(tmp_path)
    with pytest.raises(ConfigError, match="no checkpoint at"):
        open_answer(tmp_path)
