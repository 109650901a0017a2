"""Which view goes with which: rules that hold for every seed, epoch and sample."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.builds import record_toy
from support.steps import settings_of
from support.streams import train_config

from cache_service.errors import ConfigError, ViewDriftError
from cache_service.views.order import epoch_order
from distill.batches import BatchPlan
from distill.methods import Requirements, ViewSelection, requirements_of
from distill.methods.requirements import (
    EnrichedEpochs,
    SameClassPair,
    SecondView,
    other_seed,
    positions_in,
)
from distill.stream import open_stream

LABELS = np.array([0, 1, 2, 0, 1, 0, 3, 1, 0, 2] * 5)
"""Class 3 has 5 samples, class 0 has 20."""


@given(st.integers(2, 40), st.integers(0, 500))
def test_the_other_seed_is_another_one(count, epoch):
    seeds = tuple(range(100, 100 + count))
    assert other_seed(seeds, epoch) in set(seeds) - {seeds[epoch % count]}


@given(st.integers(2, 20))
def test_every_two_seeds_meet_before_any_meet_again(count):
    met = [(epoch % count, other_seed(range(count), epoch)) for epoch in range(count * (count - 1))]
    assert len(set(met)) == len(met)


@given(st.integers(1, 50))
def test_of_twice_as_many_seeds_as_epochs_each_is_seen_once(epochs):
    seeds = range(2 * epochs)
    seen = [*range(epochs), *(other_seed(seeds, epoch) for epoch in range(epochs))]
    assert sorted(seen) == list(seeds)


def test_positions_are_where_the_order_has_the_samples():
    samples = np.array([7, 0, 33])
    found = positions_in(5, samples, num_samples=50)
    assert epoch_order(50, 5)[found].tolist() == samples.tolist()


@given(st.integers(0, 2**40), st.integers(0, 300))
def test_a_pair_is_two_samples_of_one_class_under_one_seed(seed, epoch):
    samples = np.arange(len(LABELS))
    other, pair = SameClassPair(LABELS, (seed,)).choose(samples, seed=seed, epoch=epoch)
    assert other == seed
    assert (LABELS[pair] == LABELS).all()
    assert (pair != samples).all()


def test_the_only_sample_of_a_class_is_paired_with_itself():
    pairing = SameClassPair(np.array([4, 2, 4]), (0,))
    _, pair = pairing.choose(np.array([0, 1, 2]), seed=0, epoch=0)
    assert pair.tolist() == [2, 1, 0]


def test_same_class_pairs_are_drawn_evenly_and_anew():
    pairing, counts = SameClassPair(LABELS, (1,)), np.zeros(len(LABELS), int)
    for epoch in range(2000):
        counts[pairing.choose(np.array([6]), seed=1, epoch=epoch)[1]] += 1
    drawn = counts[(LABELS == 3) & (np.arange(len(LABELS)) != 6)]
    assert drawn.sum() == 2000
    assert (abs(drawn - 500) < 5 * np.sqrt(500 * 0.75)).all()


def test_same_class_pairs_depend_on_seed_epoch_and_sample_alone():
    pairing = SameClassPair(LABELS, (3, 4))
    _, whole = pairing.choose(np.arange(50), seed=3, epoch=7)
    copy = pickle.loads(pickle.dumps(pairing))
    for sample in (41, 0, 13):
        assert copy.choose(np.array([sample]), seed=3, epoch=7)[1][0] == whole[sample]
    for other in ({"seed": 4, "epoch": 7}, {"seed": 3, "epoch": 8}):
        assert (pairing.choose(np.arange(50), **other)[1] != whole).any()


@given(st.integers(0, 1000), st.integers(0, 50))
def test_an_enriched_epoch_is_half_special_in_the_order_of_its_seed(seed, epoch):
    rule = EnrichedEpochs(LABELS, (2, 3))
    positions = rule.positions(seed, epoch)
    samples = epoch_order(50, seed)[positions]
    assert (np.diff(positions) > 0).all()
    assert rule.num_samples == len(samples) == len(set(samples.tolist())) == 30
    special = np.isin(LABELS[samples], (2, 3))
    assert special.sum() == 15
    assert set(samples[special].tolist()) == set(np.flatnonzero(np.isin(LABELS, (2, 3))).tolist())
    assert rule.oversampling == 35 / 15


def test_the_other_half_is_drawn_anew_each_epoch_from_all_others():
    rule, counts = EnrichedEpochs(LABELS, (2, 3)), np.zeros(50)
    for epoch in range(400):
        counts[epoch_order(50, 0)[rule.positions(0, epoch)]] += 1
    others = counts[~np.isin(LABELS, (2, 3))]
    assert (abs(others - 400 * 15 / 35) < 5 * np.sqrt(400 * 0.25)).all()


def test_where_the_others_are_fewer_all_of_them_are_seen():
    rule = EnrichedEpochs(LABELS, (0, 1, 2))
    assert rule.num_samples == 50
    assert rule.oversampling == 1.0


def test_the_batches_of_an_enriched_epoch_tile_it():
    required = Requirements(special_classes=(2, 3))
    selection = ViewSelection(required, labels_N=LABELS, seeds=(4,))
    plan = BatchPlan(selection.num_samples, 8, (4,), 1)
    cursors = [plan.cursor(step) for step in range(plan.num_steps)]
    tiled = [selection.positions(each.start, each.stop, seed=4, epoch=0) for each in cursors]
    wanted = EnrichedEpochs(LABELS, (2, 3)).positions(4, 0)
    assert np.concatenate(tiled).tolist() == wanted.tolist()


def test_an_epoch_without_requirements_is_read_in_order():
    selection = ViewSelection(Requirements(), labels_N=LABELS, seeds=(0,))
    assert selection.positions(3, 7, seed=0, epoch=0).tolist() == [3, 4, 5, 6]
    assert selection.num_samples == 50
    assert selection.other_views(np.arange(4), seed=0, epoch=0) == {}


TOYS = {"name": "support.toys:patches", "args": {"num_samples": 96}}
SMALL = {"preset": "cifar", "size": 16}


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "c"
    return record_toy(str(path), scales=[1], seeds="0:3").url


def stream_of(method, **changes):
    changes = {"dataset": TOYS, "epochs": 4, "batch_size": 20} | changes
    config = train_config("unused", method=settings_of(method).model_dump(), **changes)
    return open_stream(config, device=torch.device("cpu"), methods=[config.method])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_other_view_is_of_the_same_samples_under_the_other_seed(url, workers):
    stream = stream_of("ddgsd", caches=[url], workers=workers, loader="workers")
    for batch in stream.batches(0):
        (other,) = batch.other_views.values()
        assert other.samples_B.tolist() == batch.samples_B.tolist()
        assert other.labels_B.tolist() == batch.labels_B.tolist()
        assert other.cursor.seed == other_seed((0, 1, 2), batch.cursor.epoch)
        views = stream.replay.views.render(
            other.cursor.seed, positions_in(other.cursor.seed, other.samples_B, num_samples=96)
        )
        assert views.pixels_BHW3.tobytes() == other.images_BHW3.numpy().tobytes()
        recorded = stream.replay.caches[0].lookup(other.cursor.seed, other.samples_B.numpy())
        assert recorded["logits"].tobytes() == other.rows[0]["logits"].numpy().tobytes()


def test_same_class_pairs_come_with_their_own_views(url):
    for batch in stream_of("cs-kd", caches=[url]).batches(0):
        (pair,) = batch.other_views.values()
        assert pair.labels_B.tolist() == batch.labels_B.tolist()
        assert (pair.samples_B != batch.samples_B).all()
        assert pair.cursor == batch.cursor


@pytest.mark.parametrize("method", ["ddgsd", "cs-kd", "specialist"])
def test_a_resumed_stream_goes_on_with_the_same_pairs(url, method):
    stream = stream_of(method, caches=[url])
    unbroken = list(stream.batches(0))
    assert len(unbroken) == stream.facts.plan.num_steps
    for first in (1, 7, 13):
        for found, wanted in zip(stream.batches(first), unbroken[first:], strict=True):
            assert found.other_views.keys() == wanted.other_views.keys()
            names = found.other_views
            others = [(found.other_views[name], wanted.other_views[name]) for name in names]
            for one, other in [(found, wanted), *others]:
                assert one.samples_B.tolist() == other.samples_B.tolist()
                assert torch.equal(one.images_BHW3, other.images_BHW3)


def test_without_a_cache_both_views_are_new_in_every_epoch():
    stream = stream_of("ddgsd", caches=[], augment=SMALL)
    seeds = [
        {batch.cursor.seed, batch.other_views["second_view"].cursor.seed}
        for batch in stream.batches(0)
    ]
    assert stream.facts.plan.seeds == tuple(range(8))
    assert len(set().union(*seeds)) == 8


def test_the_other_view_is_held_against_its_own_record_too(url, tmp_path):
    # The same samples, so the order is right, but under a recipe whose views are others.
    stream = stream_of("ddgsd", caches=[url], loader="workers")
    touched, image = stream.replay.images, stream.replay.images.image
    first = next(iter(stream.batches(0)))
    calls = []

    def wrong_later(sample):
        calls.append(sample)
        found = image(sample)
        return found if len(calls) <= len(first.samples_B) else found.point(lambda v: 255 - v)

    touched.image = wrong_later
    with pytest.raises(ViewDriftError, match="is not what the teacher saw"):
        next(iter(stream.batches(0)))


def test_an_enriched_stream_reads_only_its_samples_and_says_by_how_much_it_favors(url):
    stream = stream_of("specialist", caches=[url])
    assert stream.facts.plan.num_samples == 2 * 38
    assert stream.facts.identity["oversampling"] == (96 - 38) / 38
    seen = [batch.labels_B for batch in stream.batches(0) if batch.cursor.epoch == 0]
    labels = torch.cat(seen)
    assert torch.isin(labels, torch.tensor([1, 3])).sum() == 38 == len(labels) / 2


def test_one_seed_is_too_few_for_two_views(url):
    with pytest.raises(ConfigError, match=r"takes two seeds, but this run has only .*1") as refusal:
        stream_of("ddgsd", caches=[url], seeds="1:2")
    assert refusal.value.exit_code == 2


def test_the_requirements_of_several_students_are_met_together():
    found = requirements_of(settings_of("ddgsd"), settings_of("kd"), settings_of("cs-kd"))
    assert found == Requirements(other_views=(SecondView, SameClassPair))
    assert requirements_of(settings_of("kd"), settings_of("ce")) == Requirements()
    assert requirements_of(settings_of("ps-kd"), settings_of("peers")) == Requirements(
        prediction_history=True, peers=True
    )


@pytest.mark.parametrize("other", ["kd", "specialist"])
def test_specialists_of_other_classes_are_refused_beside_one(other):
    settings = settings_of(other, **({"classes": (0, 1)} if other == "specialist" else {}))
    with pytest.raises(ConfigError, match=r"epochs of different classes: specialist \[1, 3\]; "):
        requirements_of(settings_of("specialist"), settings)
    same = [settings_of("specialist"), settings_of("specialist", alpha=0.1)]
    assert requirements_of(*same).special_classes == (1, 3)


def test_classes_without_samples_are_refused():
    required = requirements_of(settings_of("specialist"))
    with pytest.raises(ConfigError, match=r"no sample of method\.classes"):
        ViewSelection(required, seeds=(0,), labels_N=np.zeros(4, int))
