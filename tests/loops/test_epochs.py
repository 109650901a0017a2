"""A dataset of several seeds knows its epoch, and refuses to be read in another order."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

from cache_service.errors import ConfigError, RowsNotBuiltError
from cache_service.rows.sampler import PositionSampler
from cache_service.views.order import pass_order
from distill import CachedDataset

SIZE = 256


@pytest.fixture
def data(cache, images):
    return CachedDataset(cache, images, seeds=(0, 1))


def read(loader):
    return torch.cat([images for images, _, _ in loader])


@pytest.fixture(scope="module")
def epochs(url, images):
    """All views of both seeds, read one seed at a time."""
    from distill import load_cache

    return [
        read(DataLoader(CachedDataset(load_cache(url), images, seed=seed), SIZE)) for seed in (0, 1)
    ]


def expected(epochs, epoch):
    """Views of an epoch: those of its seed, in the order of the pass over the seeds."""
    views, turn = epochs[epoch % 2], epoch // 2
    return views[pass_order(len(views), epoch % 2, 1, turn).copy()]


def test_set_epoch_goes_through_the_seeds_in_turn(data, epochs):
    assert not torch.equal(*epochs)
    assert not torch.equal(expected(epochs, 2), epochs[0])
    for epoch in range(5):
        data.set_epoch(epoch)
        assert data.seed == epoch % 2
        assert torch.equal(read(DataLoader(data, SIZE)), expected(epochs, epoch))


@pytest.mark.parametrize("context", ["fork", "forkserver"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_persistent_workers_hear_of_a_new_epoch(data, epochs, context):
    # A worker has a copy of the dataset; only shared memory reaches it once it runs.
    loader = DataLoader(
        data, SIZE, num_workers=2, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in range(3):
        data.set_epoch(epoch)
        assert torch.equal(read(loader), expected(epochs, epoch))


def test_an_epoch_that_is_read_again_without_set_epoch_is_refused(data):
    loader = DataLoader(data, SIZE)
    next(iter(loader))  # a look at the first batch is no epoch
    read(loader)
    said = r"epoch 0 was read to its end and begins again: without set_epoch, every epoch would"
    with pytest.raises(ConfigError, match=said):
        next(iter(loader))
    data.set_epoch(0)  # asked for
    read(loader)


def test_an_epoch_read_again_is_refused_with_dropped_batches_and_in_workers(data):
    loader = DataLoader(data, SIZE, drop_last=True, num_workers=2, timeout=60)
    read(loader)
    with pytest.raises(ConfigError, match="begins again: without set_epoch"):
        read(loader)


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_a_sampler_sets_the_epoch_and_refuses_to_begin_it_twice(data, epochs, rank, world):
    sampler = data.sampler(rank, world, batch_size=64)
    loader = DataLoader(data, 64, sampler=sampler)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert torch.equal(
            read(loader),
            expected(epochs, epoch)[list(PositionSampler(1442, rank, world, batch_size=64))],
        )
    with pytest.raises(ConfigError, match=r"epoch 2 was read to its end.*sampler=data.sampler\(\)"):
        list(sampler)


def test_one_seed_may_be_read_again_and_again(cache, images):
    loader = DataLoader(CachedDataset(cache, images, seeds=[1]), SIZE)
    assert torch.equal(read(loader), read(loader))


@pytest.mark.parametrize("batch_size", [1, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_shuffled_order_is_refused(data, batch_size, workers):
    loader = DataLoader(data, batch_size, shuffle=True, num_workers=workers)
    with pytest.raises(ConfigError, match="recorded order is a shuffle already") as refusal:
        read(loader)
    assert "train_sampling_strategy='sequential'" in str(refusal.value)


def test_shuffled_batches_of_neighbors_are_refused(data):
    batches = [list(range(first, first + 64)) for first in range(0, 256, 64)]
    with pytest.raises(ConfigError, match=r"positions \d+, \d+.* were asked for"):
        read(DataLoader(data, batch_sampler=[batches[i] for i in (3, 1, 2)]))


def test_strided_ranks_are_refused(data):
    sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)
    with pytest.raises(ConfigError, match=r"1, 3, 5, 7 of epoch 0 were asked for, 2 apart") as said:
        read(DataLoader(data, 64, sampler=sampler))
    assert "data.sampler(rank, world, batch_size=...)" in str(said.value)


@pytest.mark.parametrize(
    "batches",
    [
        [[*range(1408, 1442), *range(30)]],
        [list(range(64, 128)), list(range(1280, 1344)), list(range(64))],
    ],
    ids=["filled up", "a whole batch again"],
)
def test_views_repeated_to_make_ranks_even_are_refused(data, batches):
    with pytest.raises(ConfigError, match=r"which begins again.*even_batches"):
        read(DataLoader(data, batch_sampler=batches))


def test_any_order_is_given_where_it_is_asked_for(cache, images, epochs):
    data = CachedDataset(cache, images, seeds=(0, 1), order="any")
    order = torch.randperm(len(data)).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read(DataLoader(data, SIZE, sampler=order)), epochs[0][order])
    assert torch.equal(read(DataLoader(data, SIZE)), epochs[0])
    assert torch.equal(read(DataLoader(data, SIZE)), epochs[0])


def test_single_items_are_given_in_any_order(data, epochs):
    for position in (700, 3, 1441):
        assert torch.equal(data[position][0], epochs[0][position])


def test_a_part_of_an_epoch_is_read_in_order_and_may_be_resumed(data, epochs):
    part = Subset(data, range(100, 900))
    assert torch.equal(read(DataLoader(part, 64)), epochs[0][100:900])
    data.set_epoch(1)
    rest = [range(first, min(first + 64, 1442)) for first in range(512, 1442, 64)]
    assert torch.equal(read(DataLoader(data, batch_sampler=rest)), epochs[1][512:])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_of_a_dataset_has_an_epoch_of_its_own(data, copied):
    data.set_epoch(1)
    other = copied(data)
    assert other.seed == 1
    other.set_epoch(0)
    assert (data.seed, other.seed) == (1, 0)
    # Shared with its own workers, too.
    loader = DataLoader(other, SIZE, num_workers=1, persistent_workers=True)
    first = read(loader)
    other.set_epoch(1)
    assert not torch.equal(read(loader), first)


@pytest.mark.parametrize("epoch", [-1, 0.5, "1", None])
def test_an_epoch_is_a_whole_number(data, epoch):
    with pytest.raises(ConfigError, match=r"set_epoch\(.*epochs are 0, 1, 2"):
        data.set_epoch(epoch)


@pytest.mark.parametrize(
    ("seeds", "error", "said"),
    [
        ({}, ConfigError, "seed=None and seeds=None.*seeds=range"),
        ({"seed": 0, "seeds": [1]}, ConfigError, r"seed=0 and seeds=\[1\]"),
        ({"seeds": []}, ConfigError, "no seeds.*complete_seeds"),
        ({"seeds": "0-2"}, ConfigError, "seeds='0-2': .*not of the form 0:30"),
        ({"seeds": [0.0, 1.0]}, ConfigError, "cannot be interpreted as an integer"),
        ({"seed": 0, "order": "random"}, ConfigError, "order='random'.*'recorded' or 'any'"),
        ({"seeds": [0, 9]}, RowsNotBuiltError, "seeds 9:10 were asked for.*0:2 complete"),
    ],
)
def test_seeds_and_orders_that_there_are_not_are_refused_at_once(cache, images, seeds, error, said):
    with pytest.raises(error, match=said):
        CachedDataset(cache, images, **seeds)


def test_seeds_may_be_written_as_in_a_build_file(cache, images):
    assert CachedDataset(cache, images, seeds="0:2").seeds == (0, 1)
    assert CachedDataset(cache, images, seeds=range(2)).seeds == (0, 1)


def test_an_epoch_that_changes_while_it_is_read_is_refused(data):
    batches = iter(DataLoader(data, 64))
    next(batches)
    data.set_epoch(0)  # the same one
    next(batches)
    data.set_epoch(1)
    with pytest.raises(ConfigError, match=r"set_epoch\(1\) was called while epoch 0 was read"):
        next(batches)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_in_the_middle_of_its_epoch(cache, images, epochs, workers):
    stateful = pytest.importorskip(
        "torchdata.stateful_dataloader", reason="torchdata is not installed"
    )

    def loader():
        data = CachedDataset(cache, images, seeds=(0, 1))
        return data, stateful.StatefulDataLoader(data, 128, num_workers=workers)

    data, first = loader()
    data.set_epoch(1)
    batches = iter(first)
    for _ in range(5):
        next(batches)
    resumed, rest = loader()
    rest.load_state_dict(first.state_dict())
    batches = iter(rest)  # Lightning makes the iterator before it sets the epoch of a resumed run
    resumed.set_epoch(1)
    assert torch.equal(torch.cat([views for views, _, _ in batches]), epochs[1][640:])
