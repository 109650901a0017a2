"""Scores, against their definitions and on real checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from support.streams import MemoryStream, normed_net, train_config
from support.toys import NUM_CLASSES

from cache_service.datasets import DatasetConfig
from cache_service.errors import ConfigError, KdCacheError
from cache_service.format.spec import Preprocess
from distill.config import EvaluateConfig
from distill.evaluate import HeldOut, evaluate, evaluate_checkpoint
from distill.scores import Tally
from distill.trainer import train

PREPROCESS = Preprocess(size=8, mean=(0.5,) * 3, std=(0.25,) * 3)
PATCHES = {"name": "support.toys:patches", "args": {"num_samples": 40}}


def tally(logits, labels, *, batch=64):
    counted = Tally(torch.device("cpu"))
    for start in range(0, len(labels), batch):
        counted.add(logits[start : start + batch], labels[start : start + batch])
    return counted.evaluation()


def test_scores_are_their_definitions_however_they_are_batched():
    drawn = torch.Generator().manual_seed(1)
    logits = 2 * torch.randn(500, 12, generator=drawn)
    labels = torch.randint(0, 12, (500,), generator=drawn)
    found = tally(logits, labels, batch=64)
    assert found.num_samples == 500
    assert found.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert found.top5 == pytest.approx((ranks < 5).double().mean().item())
    assert found.nll == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found.agreement is None
    whole = tally(logits, labels, batch=500)
    assert tuple(found)[:5] == pytest.approx(tuple(whole)[:5])


def slow_ece(logits, labels):
    """Sum over 15 bins of |share right - mean confidence| times the bin's share of samples."""
    p = F.softmax(logits.double(), -1).numpy()
    confidence, guess = p.max(1), p.argmax(1)
    right = guess == labels.numpy()
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            total += abs(right[inside].mean() - confidence[inside].mean()) * inside.mean()
    return total


def test_the_calibration_error_is_its_definition():
    drawn = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(2000, 7, generator=drawn)
    labels = torch.randint(0, 7, (2000,), generator=drawn)
    assert tally(logits, labels).ece == pytest.approx(slow_ece(logits, labels), abs=1e-6)


@pytest.mark.parametrize(
    ("margin", "share_right", "ece"),
    [(100.0, 1.0, 0.0), (100.0, 0.0, 1.0), (0.0, 1.0, 0.5)],
)
def test_certain_right_wrong_and_undecided(margin, share_right, ece):
    labels = torch.full((10,), int(1 - share_right))
    logits = torch.tensor([margin, 0.0]).expand(10, 2)
    assert tally(logits, labels).ece == pytest.approx(ece, abs=1e-6)


def test_the_last_two_bins_do_not_make_up_for_each_other():
    sure, surer = 0.92, 0.98  # in the 14th and the 15th bin
    p = torch.tensor([[sure, 1 - sure], [surer, 1 - surer]])
    found = tally(p.log(), torch.tensor([0, 1]))
    assert found.ece == pytest.approx(((1 - sure) + surer) / 2, abs=1e-6)


def test_fewer_than_five_classes_leave_nothing_outside_the_top_five():
    assert tally(torch.zeros(4, 3), torch.tensor([0, 1, 2, 2])).top5 == 1.0


def test_nothing_to_score_is_refused():
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        evaluate(normed_net(), [], PREPROCESS)


def test_a_model_is_scored_in_evaluation_mode_and_put_back():
    model = normed_net().train()
    statistics = model.stem[1].running_mean.clone()
    stream = MemoryStream(train_config("unused"))
    first = evaluate(model, stream.batches(0), PREPROCESS)
    assert first == evaluate(model, stream.batches(0), PREPROCESS)
    assert model.training
    assert torch.equal(model.stem[1].running_mean, statistics)
    assert not evaluate(model.eval(), stream.batches(0), PREPROCESS) or not model.training


def test_agreement_is_the_share_of_equal_guesses():
    model = normed_net().eval()
    stream = MemoryStream(train_config("unused", epochs=1))

    def teach(batch):
        views = batch.images_BHW3.permute(0, 3, 1, 2).float() / 255
        logits = model((views - 0.5) / 0.25)
        logits[0] = -logits[0]  # disagree about one view of each batch
        return logits

    found = evaluate(model, stream.batches(0), PREPROCESS, teach=teach)
    assert found.num_samples == 22
    assert found.agreement == pytest.approx(16 / 22)


def held_out(**changes):
    config = EvaluateConfig.model_validate({"dataset": PATCHES} | changes)
    return HeldOut(config, num_classes=NUM_CLASSES, view_size=16, batch_size=16, workers=0)


def test_held_out_views_are_each_sample_once_and_the_same_each_time():
    views = held_out()
    first, again = list(views), list(views)
    samples = np.concatenate([batch.samples_B for batch in first])
    assert sorted(samples.tolist()) == list(range(40))
    assert [len(batch.labels_B) for batch in first] == [16, 16, 8]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.images_BHW3, other.images_BHW3)


def test_held_out_views_may_have_a_recipe_and_a_batch_size_of_their_own():
    views = held_out(augment={"preset": "none", "size": 12}, batch_size=40)
    (batch,) = views
    assert batch.images_BHW3.shape == (40, 12, 12, 3)


def test_held_out_classes_must_be_the_students():
    config = EvaluateConfig.model_validate({"dataset": PATCHES})
    with pytest.raises(ConfigError, match="has 5 classes, but the student has 7"):
        HeldOut(config, num_classes=7, view_size=16, batch_size=16, workers=0)


PLACES = tuple(f"place{i}" for i in range(NUM_CLASSES))


def test_held_out_labels_follow_the_class_names_of_training():
    config = EvaluateConfig.model_validate({"dataset": PATCHES})
    sizes = {"num_classes": NUM_CLASSES, "view_size": 16, "batch_size": 40, "workers": 0}
    (plain,) = HeldOut(config, **sizes, classes=PLACES)
    (reversed_,) = HeldOut(config, **sizes, classes=PLACES[::-1])
    assert torch.equal(reversed_.labels_B, NUM_CLASSES - 1 - plain.labels_B)


def test_held_out_classes_that_training_did_not_have_are_named():
    config = EvaluateConfig.model_validate({"dataset": PATCHES})
    sizes = {"num_classes": NUM_CLASSES, "view_size": 16, "batch_size": 40, "workers": 0}
    with pytest.raises(ConfigError, match="'place4' of 5 classes here, where training has 'sea'"):
        HeldOut(config, **sizes, classes=(*PLACES[:4], "sea"))


def test_a_checkpoint_remembers_its_class_names(tmp_path, monkeypatch):
    config = train_config(
        tmp_path,
        dataset=PATCHES,
        caches=[],
        augment={"preset": "none", "size": 16},
        method={"name": "ce"},
    )
    train(config)
    found = evaluate_checkpoint(tmp_path, dataset=config.dataset)
    arranged = config.dataset.model_copy(update={"classes": PLACES[::-1]})
    assert evaluate_checkpoint(tmp_path, dataset=arranged) == found
    monkeypatch.setattr("support.toys.Patches.__getattribute__", _renamed)
    with pytest.raises(ConfigError, match="are not those of training: 'sea0'"):
        evaluate_checkpoint(tmp_path, dataset=config.dataset)


def _renamed(patches, name):
    value = object.__getattribute__(patches, name)
    return tuple(word.replace("place", "sea") for word in value) if name == "classes" else value


def test_a_run_scores_its_average_every_few_epochs_and_at_the_end(tmp_path):
    config = train_config(tmp_path, epochs=5, ema=0.5, evaluate={"dataset": PATCHES, "every": 2})
    events = []
    result = train(config, stream=MemoryStream(config), on_event=events.append)
    scored = [event for event in events if event.kind == "evaluation"]
    assert [event.epoch for event in scored] == [2, 4, 5]
    assert result.history.last.top1 == scored[-1].values["eval_top1"]
    assert result.history.best.top1 == max(event.values["eval_top1"] for event in scored)
    assert evaluate_checkpoint(tmp_path, device="cpu") == result.history.last
    rows = [event.values["eval_top1"] for event in events if event.kind == "epoch"]
    assert [row is None for row in rows] == [True, False, True, False, False]


def test_a_checkpoint_is_scored_on_another_dataset_when_asked(tmp_path):
    config = train_config(tmp_path)
    train(config, stream=MemoryStream(config))
    other = DatasetConfig.model_validate(PATCHES | {"args": {"num_samples": 30, "salt": 3}})
    found = evaluate_checkpoint(tmp_path / "checkpoint.pt", dataset=other, batch_size=7)
    assert found.num_samples == 30


def test_a_checkpoint_without_anything_to_score_on_is_refused(tmp_path):
    config = train_config(tmp_path)
    train(config, stream=MemoryStream(config))
    with pytest.raises(ConfigError, match="does not say what to evaluate on"):
        evaluate_checkpoint(tmp_path)


def test_the_exported_student_scores_as_its_checkpoint_does(tmp_path):
    config = train_config(tmp_path / "run", evaluate={"dataset": PATCHES}, ema=0.5, epochs=1)
    train(config, stream=MemoryStream(config))
    exported = tmp_path / "run" / "student.safetensors"
    assert evaluate_checkpoint(exported) == evaluate_checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.with_name("config.yaml").unlink(), "config.yaml, which describes"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "cannot be read"),
        (lambda path: save_file({"w": torch.zeros(2)}, path), "not written by `kd-cache train`"),
        (lambda path: path.unlink(), "is not a file"),
    ],
    ids=["config is missing", "truncated", "another program's", "missing"],
)
def test_an_exported_student_that_cannot_be_scored_is_refused_in_one_safe_line(
    tmp_path, spoil, reason
):
    config = train_config(tmp_path, evaluate={"dataset": PATCHES}, epochs=1)
    train(config, stream=MemoryStream(config))
    exported = tmp_path / "student.safetensors"
    spoil(exported)
    with pytest.raises(KdCacheError, match=reason) as refused:
        evaluate_checkpoint(exported)
    assert "\n" not in str(refused.value)


def test_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no checkpoint at"):
        evaluate_checkpoint(tmp_path)
