"""What teachers answer, and which part of it is recorded."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.models.answers import LOG_FLOOR
from cache_service.teacher.settings import TeacherConfig

MODULE = """
import torch
from collections import namedtuple
from torch import nn

class Plain(nn.Module):
    '''Logits by the mean color, then what a kind of network makes of them.'''
    def __init__(self, answer, outputs, channels=3):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("weight", torch.randn(channels, outputs, generator=generator) * 4)
        self.answer = answer
    def forward(self, images):
        return self.answer(images.mean((2, 3)) @ self.weight)

Output = namedtuple("Output", "loss logits")
class Holder:
    def __init__(self, logits):
        self.logits, self.hidden = logits, None

def kind(answer):
    return lambda num_classes=10, outputs=None: Plain(answer, outputs or num_classes)

plain = kind(lambda z: z)
holder = kind(Holder)
fields = kind(lambda z: Output(None, z))
mapping = kind(lambda z: {"logits": z, "features": z[:, :1]})
named = kind(lambda z: {"class": {"main": z}, "other": z + 1})
pair = kind(lambda z: (z, z + 1))
single = kind(lambda z: [z])
pixels = kind(lambda z: z[:, :, None, None])
softmax = kind(lambda z: (50 * z).softmax(1))
sigmoid = kind(lambda z: z.sigmoid())
log_softmax = kind(lambda z: z.log_softmax(1))
one = kind(lambda z: z[:, :1])
flat = kind(lambda z: z[:, 0])
maps = kind(lambda z: z[:, :, None, None].expand(-1, -1, 2, 2))
labels = kind(lambda z: z.argmax(1, keepdim=True).expand(-1, 2))
joined = kind(lambda z: torch.cat([z, z]))
broken = kind(lambda z: z * float("nan"))
class Sum(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, num_classes)
    def forward(self, images):
        return self.fc(self.conv(images).mean((2, 3)))
def scripted(num_classes=10):
    return torch.jit.script(Sum(num_classes))
def program(num_classes=10):
    example = torch.zeros(2, 3, 32, 32)
    return torch.export.export(Sum(num_classes).eval(), (example,)).module()
def grey(num_classes=10):
    return Plain(lambda z: z, num_classes, channels=1)
def half(num_classes=10):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes)).half()
class Viewed(nn.Module):
    '''A network that flattens by view, which the channels-last format does not allow.'''
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, 4), nn.Linear(256, 10)
    def forward(self, images):
        return self.fc(self.conv(images).view(len(images), -1))
def viewed(num_classes=10):
    torch.manual_seed(3)
    return Viewed()
"""


@pytest.fixture(scope="session")
def module(tmp_path_factory):
    """The name of an importable module of teachers."""
    folder = tmp_path_factory.mktemp("outputs")
    (folder / "kd_cache_test_outputs.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield "kd_cache_test_outputs"


@pytest.mark.parametrize(
    ("kind", "output"),
    [
        ("holder", None),
        ("fields", None),
        ("mapping", None),
        ("single", None),
        ("pixels", None),
        ("pair", 0),
        ("pair", "mean"),
        ("named", "class.main"),
        ("named", "other"),
    ],
)
def test_logits_are_found_in_what_a_network_returns(load, views, module, kind, output):
    plain = load(f"{module}:plain").answer(views)
    added = {"mean": 0.5, "other": 1.0}.get(output, 0.0)
    teacher = load(f"{module}:{kind}", output=output)
    np.testing.assert_allclose(teacher.answer(views), plain + added, rtol=1e-6, atol=1e-6)
    assert teacher.id.output == output


@pytest.mark.parametrize(
    ("kind", "output", "says"),
    [
        ("pair", None, r"a tuple of 0: \(2, 10\), 1: \(2, 10\).*teacher\.output .* example 0"),
        ("named", None, r"a dict of class: a dict, other: \(2, 10\).*teacher\.output .* other"),
        ("pair", 2, r"and output 2 means nothing"),
        ("named", "class", r"and output 'class' means a dict"),
        ("one", None, r"answers \(2, 1\) where logits of shape \(2, classes\)"),
        ("flat", None, r"answers \(2,\) where logits"),
        ("maps", None, r"answers \(2, 10, 2, 2\) where logits"),
        ("labels", None, r"answers \(2, 2\) of int64 where logits"),
        ("joined", None, r"answers 4 rows for 2 images"),
        ("broken", None, "not finite"),
    ],
)
def test_what_is_no_row_of_logits_is_named(load, module, kind, output, says):
    with pytest.raises(UnsupportedError, match=says) as refusal:
        load(f"{module}:{kind}", output=output)
    assert "\n" not in str(refusal.value)


def test_an_output_is_not_chosen_where_there_is_only_one(load, module):
    with pytest.raises(ConfigError, match=r"teacher\.output is 0, but .* answers one tensor"):
        load(f"{module}:plain", output=0)


def test_probabilities_are_refused_until_they_are_named(load, module):
    with pytest.raises(UnsupportedError, match=r"probabilities.*teacher\.answers: probabilities"):
        load(f"{module}:softmax")
    with pytest.raises(UnsupportedError, match=r"numbers from .* do not sum to 1"):
        load(f"{module}:plain", answers="probabilities")
    assert load(f"{module}:softmax", answers="logits").id.answers == "logits"


def test_a_sigmoid_is_noticed_and_can_be_recorded_as_it_is(load, module):
    with pytest.raises(UnsupportedError, match=r"from 0 to 1 only.*teacher\.answers: logits"):
        load(f"{module}:sigmoid")
    load(f"{module}:sigmoid", answers="logits")


@pytest.mark.filterwarnings("ignore")  # torch's remarks about TorchScript
def test_torchscript_is_a_teacher_and_an_exported_program_says_why_not(load, views, module):
    assert load(f"{module}:scripted").answer(views).shape == (6, 1, 10)
    with pytest.raises(UnsupportedError, match="has no cells"):
        load(f"{module}:scripted", given={"scales": (1, 2)})
    with pytest.raises(UnsupportedError, match="cannot be put into evaluation mode"):
        load(f"{module}:program")


def test_probabilities_are_recorded_as_their_logarithm(load, views, module):
    teacher = load(f"{module}:softmax", answers="probabilities")
    logits = torch.from_numpy(50 * load(f"{module}:plain").answer(views)).double()
    wanted = logits.log_softmax(2).clamp_min(np.log(LOG_FLOOR)).numpy()
    assert wanted.min() < -87  # zeros occur, and count as 2**-126
    np.testing.assert_allclose(teacher.answer(views), wanted, rtol=1e-3, atol=1e-3)
    assert teacher.id.answers == "probabilities"


def test_logarithms_of_probabilities_are_logits(load, views, module):
    answers = load(f"{module}:log_softmax").answer(views)
    np.testing.assert_allclose(np.exp(answers).sum(2), 1, rtol=1e-5)


def test_defaults_leave_no_trace_in_the_identity(load, module):
    for document in (
        load(f"{module}:plain").id.model_dump(mode="json"),
        TeacherConfig(model="resnet8x4").model_dump(mode="json"),
    ):
        later = {"classes", "output", "answers", "feature_map", "classifier", "channels"}
        assert not later & document.keys()


def test_an_index_is_the_same_however_it_is_written():
    assert TeacherConfig(model="resnet8x4", output="1").output == 1


def test_every_choice_is_part_of_the_identity(load, module):
    chosen = [
        load(f"{module}:pair", output=0),
        load(f"{module}:pair", output=1),
        load(f"{module}:softmax", answers="logits"),
        load(f"{module}:softmax", answers="probabilities"),
        load(f"{module}:plain", classes=list(range(10))),
        load(f"{module}:plain", classes=list(range(9, -1, -1))),
    ]
    documents = {json.dumps(teacher.id.model_dump(mode="json")) for teacher in chosen}
    assert len(documents) == len(chosen)


def test_a_network_that_cannot_run_channels_last_runs_in_the_other_format(load, views, module):
    teacher = load(f"{module}:viewed")
    assert not teacher.channels_last
    assert load(f"{module}:plain").channels_last
    np.testing.assert_array_equal(
        teacher.answer(views), load(f"{module}:viewed", channels_last=False).answer(views)
    )


def test_half_precision_weights_compute_in_float32(load, views, module):
    assert load(f"{module}:half").answer(views).shape == (6, 1, 10)


def test_a_grey_teacher_is_fed_what_pillow_makes_of_a_view(load, views, module):
    from PIL import Image

    with pytest.raises(ConfigError, match=r"It takes 1 channel: set teacher\.channels: 1"):
        load("resnet8x4", model_args={"in_chans": 1})
    teacher = load(f"{module}:grey", channels=1, mean=(0.25,), std=(0.5,))
    grey = np.stack([np.asarray(Image.fromarray(view).convert("L")) for view in views.numpy()])
    mean_B = ((grey / 255 - 0.25) / 0.5).mean((1, 2))
    weight = torch.randn(1, 10, generator=torch.Generator().manual_seed(1)).numpy() * 4
    np.testing.assert_allclose(teacher.answer(views)[:, 0], mean_B[:, None] * weight, rtol=1e-4)
    assert teacher.id.preprocess.channels == 1


def test_a_grey_teacher_without_statistics_gets_the_average_of_imagenets(load, module):
    preprocess = load(f"{module}:grey", channels=1).id.preprocess
    assert preprocess.mean == pytest.approx([0.449], abs=1e-3)
    assert preprocess.std == pytest.approx([0.226], abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"model": "resnet18", "model_args": {"in_chans": 1}}, r"teacher\.channels: 1"),
        ({"model": "resnet18", "model_args": {"in_chans": 4}}, "It takes 4 channels, and views"),
        ({"model": "resnet18", "channels": 1}, r"It takes 3 channels: set teacher\.channels: 3"),
        ({"model": "torchvision/alexnet"}, r"teacher\.input_size .* example 224"),
        ({"model": "vit_tiny_patch16_224", "input_size": 32}, "example 224"),
    ],
)
def test_an_input_that_does_not_fit_names_the_setting_that_does(load, settings, says):
    with pytest.raises(ConfigError, match=rf"cannot be fed 32 x 32 px images.*{says}"):
        load(**settings)
