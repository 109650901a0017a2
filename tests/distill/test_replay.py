"""Invariant 1: a replayed view is the recorded view, whoever replays it and however."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.builds import record_toy
from support.toys import Patches

from cache_service.datasets import DatasetConfig, open_dataset, wrap_dataset
from cache_service.errors import RowsNotBuiltError, SpecMismatchError, ViewDriftError
from distill import CachedDataset, load_cache
from distill.batches import Batch, BatchPlan
from distill.replay import Replay
from distill.stream import train_loader
from distill.targets import TargetDecoder, tensors_of

MIXED = {
    "size": 16,
    "ops": [{"op": "pad_crop"}, {"op": "horizontal_flip"}, {"op": "mixup"}, {"op": "cutmix"}],
}
NUM_SAMPLES = 504
"""Two recorded epochs of them are 1,000 views."""

TOYS = DatasetConfig(name="support.toys:patches", args={"num_samples": NUM_SAMPLES})


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "c"
    record_toy(
        str(path),
        augment=MIXED,
        dataset=TOYS.model_dump(),
        layout={"shard_rows": 128, "chunk_rows": 32},
    )
    return str(path)


@pytest.fixture
def replay(url):
    return Replay(open_dataset(TOYS), [load_cache(url)])


def _by_position(batches: list[Batch]) -> dict[tuple[int, int], bytes]:
    """(epoch, position) -> everything that a student gets of that view."""
    found = {}
    for batch in batches:
        for row in range(len(batch.labels_B)):
            key = (batch.cursor.epoch, batch.cursor.start + row)
            assert key not in found, "each position of an epoch is read once, by one rank"
            parts = [tensor[row].numpy().tobytes() for tensor in batch[:5]]
            parts += [rows[name][row].numpy().tobytes() for rows in batch.rows for name in rows]
            found[key] = b"".join(parts)
    return found


def _all(replay, *, batch_size, world=1, **options):
    batches = []
    for rank in range(world):
        plan = BatchPlan(NUM_SAMPLES, batch_size, (0, 1), 2, rank, world)
        batches += list(train_loader(replay, plan, **options))
    return _by_position(batches)


@pytest.mark.parametrize("batch_size", [1, 7, 64, 256])
def test_batch_size_never_changes_a_view_or_a_row(replay, batch_size):
    assert _all(replay, batch_size=batch_size) == _all(replay, batch_size=16)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_the_same_recorded_epoch(replay, world):
    assert _all(replay, batch_size=16, world=world) == _all(replay, batch_size=16)


@pytest.mark.parametrize(
    ("workers", "context"),
    [
        (2, "forkserver"),
        pytest.param(1, "forkserver", marks=pytest.mark.faults),
        pytest.param(4, "forkserver", marks=pytest.mark.faults),
        pytest.param(1, "fork", marks=pytest.mark.faults),
        pytest.param(2, "fork", marks=pytest.mark.faults),
        pytest.param(4, "fork", marks=pytest.mark.faults),
        pytest.param(1, "spawn", marks=pytest.mark.faults),
        pytest.param(2, "spawn", marks=pytest.mark.faults),
        pytest.param(4, "spawn", marks=pytest.mark.faults),
    ],
)
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_however_started_replay_the_same_bytes(replay, workers, context):
    inline = _all(replay, batch_size=16)
    assert _all(replay, batch_size=16, workers=workers, context=context) == inline


def test_twenty_resumes_mid_epoch_continue_the_same_sequence(replay):
    plan = BatchPlan(NUM_SAMPLES, 53, (0, 1), 2)
    unbroken = list(train_loader(replay, plan))
    assert len(unbroken) == plan.num_steps == 20
    for first in range(20):
        rest = list(train_loader(replay, plan, steps=range(first, plan.num_steps)))
        assert _by_position(rest) == _by_position(unbroken[first:])


def test_replayed_views_are_the_recorded_witnesses(url, replay):

    cache = load_cache(url)
    for shard in range(cache.spec.num_shards):
        for seed in (0, 1):
            views = replay.views.render(seed, cache.layout.witness_positions(shard))
            np.testing.assert_array_equal(views.pixels_BHW3, cache.witnesses(seed, shard))


class _Touched(Patches):
    """The recorded dataset with one pixel changed in one sample that its identity does not read."""

    def __init__(self, sample: int) -> None:
        super().__init__(num_samples=NUM_SAMPLES)
        self._images[sample, 8, 8, 0] ^= 64


def _unread_sample() -> int:
    """A sample whose pixels are not part of the dataset's identity (64 evenly spaced are)."""
    wanted = open_dataset(TOYS).id.sha256
    for sample in range(NUM_SAMPLES):
        if wrap_dataset(_Touched(sample)).id.sha256 == wanted:
            return sample
    raise AssertionError("every sample is read")


@pytest.mark.parametrize("max_drift", [0, 4, 255])
def test_a_changed_pixel_of_the_source_is_refused_whatever_drift_is_let_through(url, max_drift):
    touched = _Touched(_unread_sample())
    data = CachedDataset(load_cache(url), images=touched, seed=0, max_drift=max_drift)
    with pytest.raises(ViewDriftError, match="is not what the teacher saw") as refusal:
        data.__getitems__(list(range(NUM_SAMPLES)))
    assert "no library that renders views changed" in str(refusal.value)
    assert "its image or its draws are other ones" in str(refusal.value)


def test_another_dataset_is_refused_before_any_row_is_read(url):
    with pytest.raises(SpecMismatchError, match="images, labels, class order or paths differ"):
        CachedDataset(load_cache(url), images=Patches(num_samples=NUM_SAMPLES - 1), seed=0)
    with pytest.raises(SpecMismatchError, match="sha256"):
        CachedDataset(load_cache(url), images=Patches(num_samples=NUM_SAMPLES, salt=1), seed=0)


def test_a_seed_outside_the_recording_is_refused_at_once(url):
    with pytest.raises(RowsNotBuiltError, match=r"seeds there: 0:2.*--seeds 9:10"):
        CachedDataset(load_cache(url), images=Patches(num_samples=NUM_SAMPLES), seed=9)


def test_cached_dataset_gives_image_label_and_teacher_logits(tmp_path):
    record_toy(str(tmp_path / "c"), scales=[1], dataset=TOYS.model_dump())
    data = CachedDataset(
        load_cache(str(tmp_path / "c")), images=Patches(num_samples=NUM_SAMPLES), seed=1
    )
    assert len(data) == NUM_SAMPLES
    loader = torch.utils.data.DataLoader(data, batch_size=32)
    images, labels, logits = next(iter(loader))
    assert images.shape == (32, 3, 16, 16)
    assert images.dtype == torch.float32
    assert 0 <= images.min() <= images.max() <= 1
    assert labels.dtype == torch.int64
    assert logits.shape == (32, 5)
    assert torch.isfinite(logits).all()


def test_a_mixing_recipe_gives_label_shares_that_sum_to_one(url):
    data = CachedDataset(load_cache(url), images=Patches(num_samples=NUM_SAMPLES), seed=0)
    _, shares, logits = data[5]
    assert shares.shape == (5,)
    assert float(shares.sum()) == pytest.approx(1)
    assert logits.shape == (5, 5)


def test_dropped_classes_get_the_logits_of_the_temperature_that_the_loss_uses(tmp_path):
    record_toy(
        str(tmp_path / "c"), scales=[1], dataset=TOYS.model_dump(), codec={"kind": "topk", "k": 3}
    )
    cache = load_cache(str(tmp_path / "c"))
    images = Patches(num_samples=NUM_SAMPLES)
    decoder = TargetDecoder(cache.spec, None, device="cpu")
    rows = tensors_of(cache.read(0, 0, 8), decoder.array_names)
    given = {}
    for temperature in (1.0, 4.0):
        data = CachedDataset(cache, images=images, seed=0, temperature=temperature)
        given[temperature] = torch.stack([item[2] for item in data.__getitems__(list(range(8)))])
        wanted = decoder.logits(rows, temperature=temperature)[:, 0]
        torch.testing.assert_close(given[temperature], wanted, rtol=0, atol=0)
    assert not torch.equal(given[1.0], given[4.0])
