"""What a student keeps of its own answers, and what it refuses to take for them."""

from __future__ import annotations

import pytest
import torch

from cache_service.errors import CorruptError, OutOfSpaceError
from distill.methods.prediction_history import FOLDER_NAME, PredictionHistory

NUM_SAMPLES, NUM_CLASSES = 20, 7


@pytest.fixture
def history(tmp_path):
    return PredictionHistory(str(tmp_path), num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES)


def logits(count, seed=0, scale=5.0):
    return scale * torch.randn(count, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / FOLDER_NAME).iterdir())


def test_what_was_said_comes_back_by_sample_as_probabilities(history):
    samples = torch.tensor([3, 19, 0])
    history.write(4, samples, logits(3))
    past = history.read(4, samples.flip(0))
    assert past.known_B.tolist() == [True] * 3
    found, wanted = past.logits_BC.softmax(-1), logits(3).flip(0).softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=5e-3, atol=1e-6)


def test_a_sample_that_was_not_seen_has_no_answer(history):
    history.write(0, torch.tensor([3, 4]), logits(2))
    past = history.read(0, torch.tensor([2, 3, 19]))
    assert past.known_B.tolist() == [False, True, False]
    assert past.logits_BC[0].tolist() == [0.0] * NUM_CLASSES


def test_before_the_first_epoch_nothing_was_said(history, tmp_path):
    assert history.read(-1, torch.tensor([0, 1])).known_B.tolist() == [False, False]
    assert not (tmp_path / FOLDER_NAME).exists()


def test_epochs_are_kept_apart(history):
    for epoch in range(3):
        history.write(epoch, torch.tensor([5]), logits(1, seed=epoch))
    for epoch in range(3):
        found = history.read(epoch, torch.tensor([5])).logits_BC.softmax(-1)
        torch.testing.assert_close(found, logits(1, seed=epoch).softmax(-1), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5, 1e30])
def test_extreme_answers_stay_finite_and_right(history, scale):
    said = logits(1, scale=scale)
    history.write(0, torch.tensor([0]), said)
    past = history.read(0, torch.tensor([0])).logits_BC
    assert past.isfinite().all()
    torch.testing.assert_close(past.softmax(-1), said.softmax(-1), rtol=5e-3, atol=1e-6)


def test_an_answer_given_twice_is_the_last_one(history):
    for seed in range(2):
        history.write(0, torch.tensor([5]), logits(1, seed=seed))
    found = history.read(0, torch.tensor([5])).logits_BC.softmax(-1)
    torch.testing.assert_close(found, logits(1, seed=1).softmax(-1), rtol=5e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("step", "kept"), [(0, []), (3, [0]), (10, [0]), (13, [0, 1]), (30, [2]), (31, [2, 3])]
)
def test_only_what_a_checkpoint_needs_is_kept(history, tmp_path, step, kept):
    for epoch in range(5):
        history.write(epoch, torch.tensor([5]), logits(1))
    history.prune(step, steps_per_epoch=10)
    assert files(tmp_path) == [f"{epoch:06d}.rows" for epoch in kept]


def test_bytes_do_not_grow_with_what_is_said(history, tmp_path):
    history.write(0, torch.tensor([0]), logits(1))
    (path,) = (tmp_path / FOLDER_NAME).iterdir()
    size = path.stat().st_size
    history.write(0, torch.arange(NUM_SAMPLES), logits(NUM_SAMPLES))
    assert path.stat().st_size == size == NUM_SAMPLES * (8 + 2 * NUM_CLASSES)


@pytest.mark.parametrize("place", [0, 3, 4, 7, 8, 12, 21])
def test_a_flipped_bit_is_refused_with_the_sample_named(history, tmp_path, place):
    history.write(0, torch.arange(NUM_SAMPLES), logits(NUM_SAMPLES))
    (path,) = (tmp_path / FOLDER_NAME).iterdir()
    content = bytearray(path.read_bytes())
    content[2 * (8 + 2 * NUM_CLASSES) + place] ^= 4
    path.write_bytes(content)
    with pytest.raises(CorruptError, match=r"of epoch 0, but the record of sample 2 is dam"):
        history.read(0, torch.arange(NUM_SAMPLES))
    assert history.read(0, torch.tensor([1, 3])).known_B.all()


def test_records_of_another_epoch_or_sample_are_refused(history, tmp_path):
    size = 8 + 2 * NUM_CLASSES
    for epoch in (0, 1):
        history.write(epoch, torch.arange(NUM_SAMPLES), logits(NUM_SAMPLES))
    first, second = sorted((tmp_path / FOLDER_NAME).iterdir())
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptError, match="sample 0 is damaged"):
        history.read(0, torch.tensor([0]))
    first.write_bytes(whole[size : 2 * size] + whole[size:])
    with pytest.raises(CorruptError, match="sample 0 is damaged"):
        history.read(0, torch.tensor([0]))


@pytest.mark.parametrize("change", ["gone", "short", "long"])
def test_a_file_that_is_not_whole_is_refused_never_taken_for_silence(history, tmp_path, change):
    history.write(0, torch.tensor([0]), logits(1))
    (path,) = (tmp_path / FOLDER_NAME).iterdir()
    if change == "gone":
        path.unlink()
    else:
        content = path.read_bytes()
        path.write_bytes(content[:-1] if change == "short" else content + b"\0")
    with pytest.raises(CorruptError, match=r"is missing|it has \d+ bytes, not 440") as refusal:
        history.read(0, torch.tensor([NUM_SAMPLES - 1]))
    assert refusal.value.exit_code == 3


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / FOLDER_NAME).write_text("in the way")
    history = PredictionHistory(str(tmp_path), num_samples=NUM_SAMPLES, num_classes=NUM_CLASSES)
    with pytest.raises(OutOfSpaceError, match="cannot write"):
        history.write(0, torch.tensor([0]), logits(1))


def test_settling_needs_nothing_to_be_there(history):
    history.sync()
    history.write(0, torch.tensor([0]), logits(1))
    history.sync()
