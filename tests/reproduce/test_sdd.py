"""The files of the tables on CIFAR-100 say what the papers say, and bad settings are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from support.command import kd_cache

from cache_service.errors import ConfigError
from cache_service.models.cells import check_cells
from cache_service.models.create import create_model
from cli.experiments.reproduce import ddgsd_cifar100, deit
from cli.experiments.reproduce.ddgsd_cifar100 import DdgsdSettings
from cli.experiments.reproduce.deit import DeitSettings
from cli.experiments.reproduce.order import Order
from cli.experiments.reproduce.school import ImageSettings, School, TrainingSettings
from cli.experiments.reproduce.sdd import FULL, METHODS, QUICK, SddSettings, method_document
from cli.experiments.reproduce.sdd_cifar100 import REPRODUCTION
from cli.experiments.reproduce.sdd_lessons import fit_cells
from cli.experiments.reproduce.sdd_pairs import QUICK as QUICK_PAIR
from cli.experiments.reproduce.sdd_pairs import USUAL, find_pair
from cli.experiments.reproduce.small_nets import cifar_resnet18, resnet
from distill.config import TrainConfig
from distill.tokens import vit_tokens

ORDER = Order(out="out", data="data", seeds=1, quick=False, say=lambda line: None)

PAIRS = (
    "resnet32x4:resnet8x4",
    "resnet32x4:ShuffleNetV1",
    "resnet32x4:ShuffleNetV2",
    "wrn_40_2:ShuffleNetV1",
    "ResNet50:MobileNetV2",
    "ResNet50:vgg8",
    "vgg13:MobileNetV2",
    "vgg13:vgg8",
    "wrn_40_2:wrn_16_2",
)


def document(settings, **own):
    school = School("some", settings.images, ORDER)
    return TrainConfig.model_validate(
        {
            "dataset": school.dataset("train"),
            "caches": "cache",
            **settings.training.document(),
            "out": "out",
            **own,
        }
    )


def test_a_student_is_trained_as_in_the_papers_code():
    pair = find_pair("resnet32x4:resnet8x4")
    own = {"student": pair.student, "method": method_document("sd-dkd", FULL, pair)}
    config = document(FULL, **own)
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.05, 0.9)
    assert (optimizer.weight_decay, optimizer.nesterov) == (5e-4, False)
    assert (config.epochs, config.batch_size, config.clip_grad_norm) == (240, 64, 40)
    assert (schedule.milestones, schedule.gamma) == ((150, 180, 210), 0.1)
    method = config.method
    assert (method.temperature, method.alpha, method.beta) == (4, 1, 8)
    assert (method.warmup_epochs, method.scales) == (20, (1, 2))
    assert config.student.mean == (0.5071, 0.4867, 0.4408)
    assert FULL.light_lr == 0.01
    assert FULL.recorded == 240
    assert FULL.images.augment()["ops"] == [
        {"op": "pad_crop", "padding": 4},
        {"op": "horizontal_flip"},
    ]


def test_each_method_has_the_settings_that_made_the_published_figures():
    pair = find_pair("vgg13:vgg8")
    found = {name: method_document(name, FULL, pair) for name in METHODS}
    assert found["ce"] == {"name": "ce"}
    assert found["kd"] == {"name": "kd", "temperature": 4, "alpha": 0.9}
    assert found["sd-kd"] == {**found["kd"], "name": "sd-kd", "scales": [1, 2]}
    assert (found["dkd"]["beta"], found["sd-dkd"]["beta"]) == (6, 6)
    assert (found["nkd"]["temperature"], found["nkd"]["gamma"]) == (1, 1.5)
    assert (found["sd-nkd"]["temperature"], found["sd-nkd"]["gamma"]) == (4, 6)
    assert {found[name]["classes"] for name in ("nkd", "sd-nkd")} == {"all"}
    for method in found.values():
        document(FULL, student=pair.student, method=method)


@pytest.mark.parametrize("name", PAIRS)
def test_every_published_pair_has_networks_with_the_cells_that_it_needs(name):
    pair = find_pair(name)
    assert pair.title == name.replace(":", " -> ")
    assert pair.published["teacher"] > pair.published["kd"] - 5
    assert pair.light == ("Net" in name.partition(":")[2])
    net = create_model(pair.student["model"], num_classes=100, seed=0)
    support = check_cells(net, 32)
    assert max(pair.scales) <= support.map_side


def test_full_forms_use_all_their_grids_and_small_images_those_that_fit():
    pair = find_pair("resnet32x4:ShuffleNetV2")
    assert fit_cells(pair, FULL.images.size).scales == (1, 2, 4)
    assert fit_cells(pair, QUICK.images.size).scales == (1, 2)
    assert fit_cells(QUICK_PAIR, QUICK.images.size).scales == QUICK_PAIR.scales


@pytest.mark.parametrize("written", ["RESNET32x4:cifar_shufflenetv2", "resnet32x4:ShuffleNetV2"])
def test_pairs_are_found_by_either_name_in_any_case(written):
    assert find_pair(written).student["model"] == "cifar_shufflenetv2"


def test_the_usual_pairs_are_like_and_unlike():
    scales = {name: find_pair(name).scales for name in USUAL}
    assert scales == {
        "resnet32x4:resnet8x4": (1, 2),
        "resnet32x4:ShuffleNetV2": (1, 2, 4),
        "wrn_40_2:ShuffleNetV1": (1, 2, 4),
    }


@pytest.mark.parametrize("written", ["resnet32x4", "resnet8x4:resnet32x4", ""])
def test_a_pair_that_nobody_published_is_refused_with_those_there_are(written):
    with pytest.raises(ConfigError, match="there is no pair") as refused:
        find_pair(written)
    assert "wrn_40_2:wrn_16_2" in refused.value.hint


def test_quick_forms_have_small_networks_that_can_be_made():
    assert max(QUICK_PAIR.scales) <= 4
    assert QUICK.teaching.epochs == QUICK.training.epochs < 20
    args = deit.QUICK.student(2)["model_args"]
    net = vit_tokens(num_classes=20, **args)
    assert net.num_teacher_heads == 2
    assert ddgsd_cifar100.QUICK.training.epochs < 20


def test_full_forms_name_pretrained_networks_of_the_study():
    student = deit.FULL.student(1)
    assert student["pretrained"] is True
    assert student["model_args"] == {"backbone": "deit_small_patch16_224", "num_tokens": 1}
    assert deit.FULL.cnn["model"] == "resnet50"
    assert deit.FULL.method("soft") == {"name": "soft", "temperature": 3, "alpha": 0.1}
    assert deit.FULL.method("hard") == {"name": "hard", "alpha": 0.5}
    assert (DdgsdSettings().consistency, DdgsdSettings().mmd) == (1, 5e-4)


def test_resnet18_for_small_images_does_not_shrink_them_in_its_stem():
    net = cifar_resnet18(num_classes=100).eval()
    assert check_cells(net, 32).map_side == 4


@pytest.mark.parametrize("depth", [7, 2, 10])
def test_a_depth_that_no_resnet_has_is_refused(depth):
    with pytest.raises(ValueError, match="depth is 8, 14"):
        resnet(depth=depth)


@pytest.mark.parametrize(
    ("model", "setting", "value"),
    [
        (SddSettings, "light_lr", 0),
        (SddSettings, "temperature", 0),
        (SddSettings, "warmup_epochs", -1),
        (SddSettings, "teacher_epochs", 0),
        (SddSettings, "recorded", 0),
        (SddSettings, "codec", {"kind": "zip"}),
        (DdgsdSettings, "consistency", -1),
        (DdgsdSettings, "mmd", -1),
        (DeitSettings, "soft_temperature", 0),
        (DeitSettings, "soft_alpha", 1.1),
        (DeitSettings, "hard_alpha", -0.1),
        (DeitSettings, "recorded", 0),
        (ImageSettings, "num_classes", 1),
        (ImageSettings, "per_class", 0),
        (ImageSettings, "shrink", 3),
        (ImageSettings, "view_size", 7),
        (ImageSettings, "preset", "none"),
        (ImageSettings, "padding", -1),
        (ImageSettings, "workers", -1),
        (TrainingSettings, "epochs", 0),
        (TrainingSettings, "batch_size", 0),
        (TrainingSettings, "clip_grad_norm", 0),
        (TrainingSettings, "amp", "int8"),
        (TrainingSettings, "beta", 1),
    ],
)
def test_settings_out_of_bounds_are_refused(model, setting, value):
    with pytest.raises(ValidationError, match=setting):
        model.model_validate({setting: value})


@pytest.mark.parametrize(
    "words",
    [
        ("hinton-mnist", "--device", "cpu"),
        ("omitted-three", "--pair", "resnet32x4:resnet8x4"),
        ("deit-cifar100", "--pair", "resnet32x4:resnet8x4"),
        ("ddgsd-cifar100", "--pair", "resnet32x4:resnet8x4"),
    ],
)
def test_an_option_that_means_nothing_to_a_table_is_refused(words):
    ended = kd_cache("reproduce", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"takes no {words[1]}" in ended.err


def test_an_unknown_pair_is_one_line_before_anything_is_written(tmp_path, strips):
    out = tmp_path / "out"
    options = ("--out", str(out), "--data", str(strips), "--pair", "resnet32x4:vgg8")
    ended = kd_cache("reproduce", "sdd-cifar100", *options)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert not out.exists()


def test_pairs_are_part_of_the_command_that_makes_the_table_again():
    order = ORDER._replace(pairs=("resnet32x4:resnet8x4",), seeds=3)
    assert order.command(REPRODUCTION.name) == (
        "kd-cache reproduce sdd-cifar100 --pair resnet32x4:resnet8x4 --seeds 3"
    )
