from __future__ import annotations

import numpy as np
import pytest
import torch

from cache_service.errors import UntrainedTeacherError
from cache_service.teacher.score import Score, require_trained, score_teacher
from cache_service.teacher.settings import TeacherConfig

CONFIG = TeacherConfig(model="colors", checkpoint="colors.pt")
NUM_CLASSES = 8


@pytest.fixture
def knowing(load, factories):
    """A teacher that tells eight colors apart."""
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    return load(f"{factories}:colors", **plain, given={"num_classes": NUM_CLASSES})


@pytest.fixture
def labeled():
    """Batches of 20 views of the wheel's colors, and the label of each view."""
    labels = np.random.default_rng(0).integers(0, NUM_CLASSES, 60)
    angles = labels * 2 * np.pi / NUM_CLASSES
    colors = np.stack([np.cos(angles), np.sin(angles), 0 * angles], axis=1) * 100 + 127
    pixels = np.broadcast_to(colors[:, None, None], (60, 32, 32, 3)).astype(np.uint8)
    return torch.from_numpy(pixels.copy()).split(20), labels


def test_a_teacher_that_knows_the_dataset_passes(knowing, labeled):
    score = score_teacher(knowing, *labeled)
    assert score == Score(accuracy=1.0, num_samples=60, chance=1 / 8)
    require_trained(score, CONFIG)


def test_another_class_order_is_refused_by_its_description(knowing, labeled):
    batches, labels = labeled
    shifted = (labels + 1) % NUM_CLASSES
    names = [f"color {number}" for number in range(NUM_CLASSES)]
    score = score_teacher(knowing, batches, shifted, names=names)
    with pytest.raises(UntrainedTeacherError, match="look like the same classes in") as refusal:
        require_trained(score, CONFIG)
    text = str(refusal.value)
    for part in ("0.0% of 60", "'color 7' for 'color 0'", "dataset.classes", "allow_untrained"):
        assert part in text
    require_trained(score, CONFIG.model_copy(update={"allow_untrained": True}))


def test_two_exchanged_classes_are_refused_though_most_views_are_right(knowing, labeled):
    batches, labels = labeled
    exchanged = np.array([1, 0, 2, 3, 4, 5, 6, 7])[labels]
    score = score_teacher(knowing, batches, exchanged)
    assert score.accuracy > score.needed
    with pytest.raises(UntrainedTeacherError, match="it answers 1 for 0, 0 for 1"):
        require_trained(score, CONFIG)


def test_a_guessing_teacher_is_refused_with_the_likely_causes(knowing, labeled):
    batches, labels = labeled
    score = score_teacher(knowing, batches, np.random.default_rng(5).permutation(labels))
    with pytest.raises(UntrainedTeacherError, match="is required") as refusal:
        require_trained(score, CONFIG)
    text = str(refusal.value)
    for part in ("of 60 views", "12.5%", "normalization", "class order", "checkpoint: colors.pt"):
        assert part in text
    assert refusal.value.exit_code == 3
    require_trained(score, CONFIG.model_copy(update={"allow_untrained": True}))


def test_the_whole_image_is_scored_where_only_the_finest_cells_are_stored(load, factories, labeled):
    batches, labels = labeled
    for batch in batches:
        batch[:, :8, :8] = 255 - batch[:, :8, :8]  # cell 0 of the finest grid, not of the image
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    asked = {"scales": (1, 2, 4), "num_classes": NUM_CLASSES}
    teacher = load(f"{factories}:pixels", **plain, given=asked)
    assert teacher.stored_scales == (4,)
    assert score_teacher(teacher, batches, labels).accuracy == 1.0


def test_chance_is_one_in_the_datasets_classes(knowing, labeled):
    assert score_teacher(knowing, *labeled, num_classes=4).chance == 0.25


@pytest.mark.parametrize(
    ("num_classes", "needed"), [(2, 0.75), (3, 2 / 3), (10, 0.2), (1000, 0.002)]
)
def test_twice_chance_is_needed_or_halfway_to_perfect_for_two_classes(num_classes, needed):
    score = Score(accuracy=needed, num_samples=9, chance=1 / num_classes)
    assert score.needed == pytest.approx(needed)
    require_trained(Score(needed + 1e-9, 9, 1 / num_classes), CONFIG)
    with pytest.raises(UntrainedTeacherError, match="where guessing gives"):
        require_trained(Score(needed - 1e-3, 9, 1 / num_classes), CONFIG)


def test_views_and_labels_must_be_as_many(knowing, labeled):
    batches, labels = labeled
    for some in (batches[:2], []):
        with pytest.raises(ValueError, match="views and 60 labels"):
            score_teacher(knowing, some, labels)
