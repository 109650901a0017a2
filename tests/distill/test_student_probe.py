"""Students are asked for random images before anything is trained."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cache_service.errors import ConfigError, KdCacheError, UnsupportedError
from distill.config import StudentConfig
from distill.students import make_student

MODULE = """
import torch
from collections import namedtuple
from torch import nn

Output = namedtuple("Output", "logits aux")

class Net(nn.Module):
    '''Two heads on a mean; `answer` makes of them what a kind of network returns.'''
    def __init__(self, num_classes, answer, channels=3):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.main, self.aux = nn.Linear(8, num_classes), nn.Linear(8, num_classes)
        self.answer = answer
    def forward(self, images):
        x = self.drop(self.norm(self.conv(images)).relu().mean((2, 3)))
        return self.answer(self.training, self.main(x), self.aux(x))

def kind(answer, **settings):
    return lambda num_classes=3: Net(num_classes, answer, **settings)

plain = kind(lambda training, main, aux: main)
auxiliary = kind(lambda training, main, aux: Output(main, aux) if training else main)
distilled = kind(lambda training, main, aux: (main, aux) if training else (main + aux) / 2)
mapping = kind(lambda training, main, aux: {"out": main, "aux": aux})
softmax = kind(lambda training, main, aux: main.softmax(1))
broken = kind(lambda training, main, aux: main / 0)
grey = kind(lambda training, main, aux: main, channels=1)
wrong = kind(lambda training, main, aux: main[:, :2])
def fails(training, main, aux):
    if training:
        raise ValueError("the auxiliary head needs a map of 5 x 5")
    return main
failing = kind(fails)
class Flat(nn.Module):
    def __init__(self, num_classes=3):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 4), nn.Linear(256, num_classes)
    def forward(self, images):
        return self.fc(self.conv(images).view(len(images), -1))
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The name of an importable module of students."""
    folder = tmp_path_factory.mktemp("students")
    (folder / "kd_cache_test_students.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "kd_cache_test_students"


def make(model, num_classes=3, **settings):
    config = StudentConfig(model=model, **settings)
    return make_student(config, num_classes=num_classes, view_size=32, teacher=None, seed=0)


def images(channels=3):
    return torch.randn(4, channels, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("plain", None),
        ("auxiliary", None),
        ("auxiliary", "logits"),
        ("mapping", "out"),
        ("distilled", "mean"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_student_answers_logits_in_both_modes(module, kind, output, training):
    model = make(f"{module}:{kind}", output=output).model.train(training)
    with torch.no_grad():
        assert model(images()).shape == (4, 3)


def test_the_mean_trains_every_head_and_an_output_one(module):
    mean = make(f"{module}:distilled", output="mean").model.train()
    mean(images()).square().sum().backward()
    assert mean.main.weight.grad.abs().sum() > 0
    assert mean.aux.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("kind", "settings", "error", "says"),
    [
        ("distilled", {}, UnsupportedError, r"tuple of 0: .*student\.output .* example 0"),
        ("distilled", {"output": 0}, UnsupportedError, r"it uses aux\.weight and 1 more.*mean"),
        ("mapping", {}, UnsupportedError, r"dict of out: \(2, 3\), aux: .*student\.output"),
        ("plain", {"output": 0}, ConfigError, r"student\.output is 0, but .* one tensor"),
        ("softmax", {}, UnsupportedError, "answers probabilities .* and losses take logits"),
        ("broken", {}, UnsupportedError, "not finite"),
        ("grey", {}, ConfigError, r"It takes 1 channel: set student\.channels: 1"),
        ("plain", {"channels": 1}, ConfigError, r"takes 3 channels: set student\.channels: 3"),
        ("wrong", {}, ConfigError, "answers 2 classes and the dataset has 3"),
        ("failing", {}, ConfigError, r"cannot be trained on them: ValueError: the auxiliary head"),
    ],
)
def test_a_student_that_does_not_fit_says_so_in_one_line(module, kind, settings, error, says):
    with pytest.raises(error, match=says) as refusal:
        make(f"{module}:{kind}", **settings)
    assert "\n" not in str(refusal.value)


def test_a_student_of_another_size_names_the_size():
    with pytest.raises(ConfigError, match=r"cannot be fed 32 x 32 px.*input_size .* example 224"):
        make("vit_tiny_patch16_224")
    assert make("vit_tiny_patch16_224", input_size=224).preprocess.size == 224


def test_a_grey_student_normalizes_one_channel(module):
    preprocess = make(f"{module}:grey", channels=1).preprocess
    assert (preprocess.mean, preprocess.std) == ((0.5,), (0.5,))


def test_probing_changes_nothing(module):
    torch.manual_seed(5)
    model = make(f"{module}:plain").model
    assert all(each.training for each in model.modules())
    assert int(model.norm.num_batches_tracked) == 0
    assert torch.equal(model.norm.running_mean, torch.zeros(8))
    assert all(parameter.grad is None for parameter in model.parameters())
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize(
    "settings",
    [
        {"channels": 2},
        {"channels": 1, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
        {"mean": (0.5,), "std": (0.5,)},
        {"output": -1},
        {"output": ""},
        {"feature_map": ""},
        {"classifier": ""},
    ],
)
def test_bounds_are_enforced(settings):
    with pytest.raises(ValidationError):
        StudentConfig(model="resnet20", **settings)


def test_batch_norm_over_tokens_in_front_of_the_pooling_is_no_obstacle():
    from cache_service.models.features import check_cells

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm1d(8)
            self.last, self.head = nn.Identity(), nn.Linear(8, 3)

        def forward(self, images):
            tokens = self.stem(images).flatten(2).transpose(1, 2)
            tokens = self.norm(tokens.flatten(0, 1)).view(len(images), -1, 8)
            return self.head(self.last(tokens).mean(1))

    assert check_cells(Tokens(), 32, trains=True).map_side == 8


def test_defaults_leave_no_trace_in_checkpoints():
    document = StudentConfig(model="resnet20").model_dump(mode="json")
    assert not {"channels", "output", "feature_map", "classifier"} & document.keys()


def test_a_named_map_must_exist(module):
    with pytest.raises(KdCacheError, match=r"no module 'normm'.*such as norm"):
        make(f"{module}:plain", feature_map="normm")


def test_batch_norm_behind_the_pooling_is_no_student_of_cells():
    from cache_service.models.features import check_cells

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(8),
        nn.Linear(8, 3),
    )
    assert check_cells(model, 32).affine
    with pytest.raises(UnsupportedError, match=r"its batch norm 3 comes after the pooling"):
        check_cells(model, 32, trains=True)
