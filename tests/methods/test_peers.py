"""Peers: what each learns from the others, at one step and over whole runs."""

from __future__ import annotations

import copy

import pytest
import torch
from support import formulas
from support.recorded_runs import AUGMENT, CODECS, Variant
from support.runs import curve, same, state_of
from support.steps import images_of, memory, settings_of, terms_of
from support.streams import MemoryStream, normed_net, plain_net, train_config
from support.toys import NUM_CLASSES
from torch import nn

from cache_service.errors import NonFiniteError
from distill.trainer import train_students


@pytest.fixture(params=[False, True], ids=["plain", "mixed"])
def stream(request):
    return memory(mixed=request.param)


@pytest.fixture(scope="module")
def nets():
    torch.manual_seed(3)
    found = [plain_net(), normed_net(), plain_net(), plain_net()]
    with torch.no_grad():
        for net in found:
            net.head.weight.mul_(10)
    return found


def assert_terms(found, **wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].detach().double(), value, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("num", [2, 3, 4])
@pytest.mark.parametrize("teacher_weight", [0, 0.3])
def test_the_terms_are_their_formula(stream, nets, num, teacher_weight):
    settings = settings_of("peers", temperature=3, weight=0.7, teacher_weight=teacher_weight)
    terms, metrics = terms_of(settings, stream, nets[0], others=nets[1:num])
    batch = stream.batch(0)
    own, *others = (net(images_of(stream)).detach().double() for net in nets[:num])
    each = [formulas.kd(own, other, 3).mean() for other in others]
    soft = formulas.kd(own, batch.rows[0]["logits"][:, 0].double(), 3).mean()
    assert_terms(
        terms,
        label=formulas.label(own, batch),
        peers=0.7 * sum(each) / (num - 1),
        soft=teacher_weight * soft,
    )
    assert metrics["top1"] == (own.argmax(-1) == formulas.larger_part(batch)).float().mean()


def test_without_its_weight_no_teacher_is_asked(stream, nets):
    stream.teacher_logits = None  # would fail if it were called
    terms_of(settings_of("peers"), stream, nets[0], others=nets[1:])


def test_one_peer_beside_a_teacher_is_kd(stream, nets):
    # label + w soft is kd with alpha = w / (1 + w), times 1 + w.
    found, _ = terms_of(settings_of("peers", teacher_weight=3, temperature=2), stream, nets[0])
    kd, _ = terms_of(settings_of("kd", alpha=0.75, temperature=2), stream, nets[0])
    torch.testing.assert_close(found["label"], 4 * kd["label"])
    torch.testing.assert_close(found["soft"], 4 * kd["soft"])
    assert found["peers"] == 0


def test_a_peer_that_is_the_teacher_teaches_as_kd_does(stream, nets):
    student, other = nets[:2]
    answer = other(images_of(stream)).detach()
    stream.teacher_logits = lambda *_, **__: answer.unsqueeze(1)
    found, _ = terms_of(settings_of("peers", temperature=4), stream, student, others=[other])
    kd, _ = terms_of(settings_of("kd", alpha=0.5), stream, student)
    torch.testing.assert_close(found["peers"], 2 * kd["soft"])


def test_at_high_temperature_peers_match_logits(nets):
    stream = memory()
    student, other = nets[:2]
    stream.teacher_logits = lambda *_, **__: other(images_of(stream)).detach().unsqueeze(1)
    hot, _ = terms_of(settings_of("peers", temperature=1000), stream, student, others=[other])
    limit, _ = terms_of(settings_of("logits", alpha=1), stream, student)
    torch.testing.assert_close(hot["peers"], limit["soft"], rtol=5e-3, atol=1e-5)


@pytest.mark.parametrize("num", [2, 3])
def test_equal_peers_are_plain(nets, num):
    stream = memory()
    terms, _ = terms_of(
        settings_of("peers"), stream, nets[0], others=[copy.deepcopy(nets[0])] * (num - 1)
    )
    assert abs(terms["peers"]) < 1e-6
    slopes = torch.autograd.grad(terms["peers"], list(nets[0].parameters()))
    assert max(slope.abs().max() for slope in slopes) < 1e-6


RICH = {
    "student__model_args": {"dropout": 0.3},
    "ema": 0.8,
    "clip_grad_norm": 1.0,
    "label_smoothing": 0.1,
    "accumulate": 2,
}


@pytest.mark.parametrize("changes", [{}, RICH, {"amp": "float16"}], ids=["bare", "rich", "half"])
def test_a_peer_without_peers_is_bit_for_bit_a_run_on_labels(tmp_path, changes):
    for name in ("peers", "ce"):
        config = train_config(tmp_path / name, method={"name": name}, **changes)
        train_students({"": config}, stream=MemoryStream(config))
    zeros = {"loss_peers": 0, "loss_soft": 0}
    found = [
        {name: value for name, value in line.items() if zeros.get(name) != value}
        for line in curve(tmp_path / "peers")
    ]
    assert found == curve(tmp_path / "ce")
    states = [state_of(tmp_path / name) for name in ("peers", "ce")]
    for state in states:
        del state["history"]["totals"]  # which have a name more
    same(*states)


def two(tmp_path, own, **changes):
    return {
        name: train_config(
            tmp_path / name, **({"method": {"name": "peers"}, "seed": place} | settings | changes)
        )
        for place, (name, settings) in enumerate(own.items())
    }


def step_by_hand(models, batch, images):
    """Mutual learning in plain PyTorch, in float64, one SGD step of 0.1 without momentum."""
    answers = [model(images) for model in models]
    for place, model in enumerate(models):
        (other,) = (answer.detach() for at, answer in enumerate(answers) if at != place)
        match = formulas.kd(answers[place], other, 1).mean()
        loss = formulas.label(answers[place], batch) + match
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, slope in zip(model.parameters(), slopes, strict=True):
                parameter -= 0.1 * slope


def test_a_run_of_peers_is_mutual_learning_written_out_by_hand(tmp_path):
    configs = two(tmp_path, {"a": {}, "b": {}}, optimizer__momentum=0, epochs=1)
    stream = MemoryStream(configs["a"])
    models = []
    for config in configs.values():
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            models.append(plain_net().double())
    for batch in stream.batches(0):
        images = (batch.images_BHW3.permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
        step_by_hand(models, batch, images)
    results = train_students(configs, stream=MemoryStream(configs["a"]))
    for model, result in zip(models, results.values(), strict=True):
        found = {name: value.double() for name, value in result.student.model.state_dict().items()}
        torch.testing.assert_close(found, dict(model.state_dict()), rtol=1e-4, atol=1e-6)


def test_peers_come_closer_to_each_other_than_strangers_do(tmp_path):
    def apart(method):
        configs = two(
            tmp_path / method["name"],
            {"a": {}, "b": {}},
            method=method,
            epochs=20,
            optimizer__lr=0.01,
        )
        results = train_students(configs, stream=MemoryStream(configs["a"], seeds=(0,)))
        images = images_of(memory())
        with torch.no_grad():
            p, q = (formulas.softmax(each.student.model(images)) for each in results.values())
        return formulas.kl(p, q).mean()

    assert apart({"name": "peers", "weight": 3}) < 0.3 * apart({"name": "ce"})


def test_a_student_with_another_method_is_nobodys_peer(tmp_path):
    own = {"a": {}, "b": {}, "plain": {"method": {"name": "ce"}}}
    three, without = two(tmp_path / "three", own), two(tmp_path / "two", {"a": {}, "b": {}})
    for configs in (three, without):
        train_students(configs, stream=MemoryStream(configs["a"]))
    for name in ("a", "b"):
        assert curve(tmp_path / "three" / name) == curve(tmp_path / "two" / name)


class Mute(nn.Module):
    """Its answers are no numbers, but for two images, as a probe has."""

    def __init__(self, num_classes):
        super().__init__()
        self.net = plain_net(num_classes)

    def forward(self, images_B3HW):
        return self.net(images_B3HW) * (1.0 if len(images_B3HW) <= 2 else torch.nan)


def mute_net(num_classes=NUM_CLASSES):
    return Mute(num_classes)


def test_the_peer_whose_answers_are_no_numbers_is_the_one_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("support.streams.mute_net", mute_net, raising=False)
    configs = two(tmp_path, {"a": {}, "b": {"student__model": "support.streams:mute_net"}})
    # It is a's loss that is computed first, and b's answers are what spoils it.
    with pytest.raises(NonFiniteError, match=r"loss of student b at step 0 .* \(logits=nan\)"):
        train_students(configs, stream=MemoryStream(configs["a"]))


BOUNDS = {"dense": 1e-3, "features": 2e-3, "int8": 2e-2}


@pytest.mark.parametrize("augment", AUGMENT)
def test_peers_learn_from_a_cache_as_from_a_live_teacher(tmp_path, recorded_runs, augment):
    def losses(codec):
        variant = Variant(codec, augment)
        configs = {
            name: recorded_runs.config(
                tmp_path / str(codec) / name,
                variant,
                [0],
                method={"name": "peers", "teacher_weight": 1, "temperature": 4},
                seed=seed,
            )
            for seed, name in enumerate(("a", "b"))
        }
        live = [recorded_runs.live(variant)] if codec is None else []
        train_students(configs, teachers=live)
        lines = [line for config in configs.values() for line in curve(config.out)]
        return [line["loss"] for line in lines if line["kind"] == "step"]

    live = losses(None)
    assert len(live) == 10
    for codec, bound in BOUNDS.items():
        assert losses(codec) == pytest.approx(live, abs=bound, rel=0), codec
    assert set(BOUNDS) == CODECS.keys() - {"topk"}
    assert losses("topk") == pytest.approx(live, rel=0.1)
