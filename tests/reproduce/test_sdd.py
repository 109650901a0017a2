"""The experiments on CIFAR-100 say what the papers say, and bad options are refused."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter
from support.command import kd_cache

from cache_service.errors import ConfigError
from cache_service.models.create import create_model
from cache_service.models.features import cell_logits, check_cells
from cli.experiments.reproduce.networks import cifar_resnet18, resnet
from cli.experiments.reproduce.sdd_cifar100 import (
    FORMS,
    LIKE_PAIRS,
    METHODS,
    TABLE,
    USUAL,
    find_pair,
    pair_document,
)
from cli.experiments.reproduce.shipped import Options, shipped_document, shipped_experiment
from distill.methods import MethodConfig
from distill.methods.published import published_of
from distill.tokens import vit_tokens

ALL_PAIRS = tuple(TABLE)


def options(name, *, quick=False):
    return Options(name=name, out="out", data="data", runs=1, quick=quick, on_message=print)


def experiment(name, *, quick=False):
    asked = options(name, quick=quick)
    return shipped_experiment(shipped_document(asked, root="data"), asked)


def pair_experiment(name):
    asked = options("sdd-cifar100")
    document = shipped_document(asked, root="data")
    return shipped_experiment(pair_document(document, find_pair(name)), asked)


def train_file(config, name):
    variant = next(each for each in config.variants() if each.name == name)
    return config.train_config(variant, 0, where="test")


def test_a_student_is_trained_as_in_the_papers_code():
    experiment_ = pair_experiment("resnet32x4:resnet8x4")
    config = train_file(experiment_, "sd-dkd")
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 0.05, 0.9)
    assert (optimizer.weight_decay, optimizer.nesterov) == (5e-4, False)
    assert (config.epochs, config.batch_size, config.clip_grad_norm) == (240, 64, 40)
    assert (schedule.milestones, schedule.gamma) == ((150, 180, 210), 0.1)
    method = config.method
    assert (method.temperature, method.alpha, method.beta) == (4, 1, 8)
    assert (method.warmup_epochs, method.scales) == (20, (1, 2))
    assert config.student.mean == (0.5071, 0.4867, 0.4408)
    build = experiment_.build_config("cells", where="test")
    assert (len(build.seeds), build.codec.kind) == (240, "int8")
    assert [op.op for op in build.augment.ops] == ["pad_crop", "horizontal_flip"]
    assert build.augment.ops[0].padding == 4


def test_each_method_has_the_settings_that_made_the_published_figures():
    config = pair_experiment("vgg13:vgg8")
    methods = {name: train_file(config, name).method for name in METHODS}
    assert (methods["kd"].temperature, methods["kd"].alpha) == (4, 0.9)
    assert (methods["sd-kd"].temperature, methods["sd-kd"].scales) == (4, (1, 2))
    assert (methods["dkd"].beta, methods["sd-dkd"].beta) == (6, 6)
    assert (methods["nkd"].temperature, methods["nkd"].gamma) == (1, 1.5)
    assert (methods["sd-nkd"].temperature, methods["sd-nkd"].gamma) == (4, 6)
    assert {methods[name].classes for name in ("nkd", "sd-nkd")} == {"all"}


def test_light_students_have_a_lower_rate_than_their_teacher():
    config = pair_experiment("wrn_40_2:ShuffleNetV1")
    assert train_file(config, "kd").optimizer.lr == 0.01
    assert config.teacher_config("teacher", where="test").optimizer.lr == 0.05


@pytest.mark.parametrize("name", ALL_PAIRS)
def test_every_published_pair_has_networks_with_the_cells_that_it_needs(name):
    pair = find_pair(name)
    assert pair.title == name.replace(":", " -> ")
    assert pair.published["teacher"] > pair.published["kd"] - 5
    assert (pair.lr is not None) == ("Net" in name.partition(":")[2])
    network = create_model(pair.student, num_classes=100, seed=0)
    check_cells(network, 32)


@pytest.mark.parametrize("name", ["ResNet50:MobileNetV2", "vgg13:MobileNetV2"])
def test_mobilenet_has_the_published_grid_of_4_x_4_on_its_2_x_2_map(name):
    pair = find_pair(name)
    network = create_model(pair.student, num_classes=100, seed=0).eval()
    assert check_cells(network, 32).map_side == 2
    experiment_ = pair_experiment(name)
    assert experiment_.build_config("cells", where="test").scales == (1, 2, 4)
    scales = {train_file(experiment_, each).method.scales for each in FORMS.values()}
    assert scales == {(1, 2, 4)}
    with torch.no_grad():
        cells_BRC = cell_logits(network, torch.randn(2, 3, 32, 32), (1, 2, 4))
    quarters, sixteenths = cells_BRC[:, 1:5], cells_BRC[:, 5:].unflatten(1, (4, 4))
    torch.testing.assert_close(sixteenths[:, ::2, ::2].flatten(1, 2), quarters)
    torch.testing.assert_close(sixteenths[:, 1::2, 1::2].flatten(1, 2), quarters)


def test_sd_nkd_of_resnet50_and_vgg8_was_published_without_the_finest_grid():
    methods = {name: train_file(pair_experiment("ResNet50:vgg8"), name).method for name in METHODS}
    assert methods["sd-nkd"].scales == (1, 2)
    assert methods["sd-kd"].scales == methods["sd-dkd"].scales == (1, 2, 4)


@pytest.mark.parametrize("name", ALL_PAIRS)
def test_every_pair_has_the_settings_of_the_published_table(name):
    experiment_, pair = pair_experiment(name), find_pair(name)
    networks = "like networks" if name in LIKE_PAIRS else "unlike networks"
    adapter = TypeAdapter(MethodConfig)
    for method, weight in (("sd-kd", None), ("sd-dkd", "beta"), ("sd-nkd", "gamma")):
        (row,) = [each for each in published_of(method) if each.data == f"CIFAR-100, {networks}"]
        train = train_file(experiment_, method)
        wanted = dict(row.method) | ({} if weight is None else {weight: pair.beta})
        assert train.method.model_copy(update={"scales": None}) == adapter.validate_python(wanted)
        assert train.clip_grad_norm == row.train["clip_grad_norm"]
        build = experiment_.build_config("cells", where="test")
        assert list(build.scales) == row.build["scales"]


@pytest.mark.parametrize("name", ALL_PAIRS)
def test_the_weight_of_a_pair_is_the_published_one(name):
    (six,) = [row for row in published_of("sd-dkd") if row.method["beta"] == 6]
    teacher, student = name.split(":")
    listed = f"{teacher} -> any" in six.data or f"{teacher} -> {student}" in six.data
    assert find_pair(name).beta == (6 if listed else 8)


def test_pairs_with_one_teacher_share_its_run_and_those_with_the_same_scales_its_recording():
    first, second, third = (
        pair_experiment(f"resnet32x4:{name}")
        for name in ("resnet8x4", "ShuffleNetV1", "ShuffleNetV2")
    )
    assert first.teacher_out("teacher") == second.teacher_out("teacher")
    assert second.cache_of("cells") == third.cache_of("cells") != first.cache_of("cells")
    assert len({config.out for config in (first, second, third)}) == 3


@pytest.mark.parametrize("written", ["RESNET32x4:cifar_shufflenetv2", "resnet32x4:ShuffleNetV2"])
def test_pairs_are_found_by_either_name_in_any_case(written):
    assert find_pair(written).student == "cifar_shufflenetv2"


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
    for name in ("sdd-cifar100", "ddgsd-cifar100", "deit-cifar100"):
        assert experiment(name, quick=True).train["epochs"] < 20
    args = experiment("deit-cifar100", quick=True).students["two-tokens"]["model_args"]
    assert vit_tokens(num_classes=20, **args).num_teacher_heads == 2


def test_full_forms_name_pretrained_networks_of_the_study():
    config = experiment("deit-cifar100")
    student = config.students["one-token"]
    assert student["pretrained"] is True
    assert student["model_args"] == {"backbone": "deit_small_patch16_224", "num_tokens": 1}
    assert config.teachers["cnn"]["student"]["model"] == "resnet50"
    soft, hard = (train_file(config, f"one-token/{kind}-cnn").method for kind in ("soft", "hard"))
    assert (soft.temperature, soft.alpha, hard.alpha) == (3, 0.1, 0.5)
    method = train_file(experiment("ddgsd-cifar100"), "ddgsd").method
    assert (method.consistency, method.mmd) == (1, 5e-4)


def test_resnet18_for_small_images_does_not_shrink_them_in_its_stem():
    network = cifar_resnet18(num_classes=100).eval()
    assert check_cells(network, 32).map_side == 4


@pytest.mark.parametrize("depth", [7, 2, 10])
def test_a_depth_that_no_resnet_has_is_refused(depth):
    with pytest.raises(ValueError, match="depth is 8, 14"):
        resnet(depth=depth)


@pytest.mark.parametrize(
    "words",
    [
        ("hinton-mnist", "--device", "cpu"),
        ("omitted-three", "--pair", "resnet32x4:resnet8x4"),
        ("deit-cifar100", "--pair", "resnet32x4:resnet8x4"),
        ("ddgsd-cifar100", "--pair", "resnet32x4:resnet8x4"),
    ],
)
def test_an_option_that_a_table_does_not_take_is_refused(words):
    ended = kd_cache("reproduce", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert f"takes no {words[1]}" in ended.err


def test_an_unknown_pair_is_one_line_before_anything_is_written(tmp_path, strips):
    out = tmp_path / "out"
    words = ("--out", str(out), "--data", str(strips), "--pair", "resnet32x4:vgg8")
    ended = kd_cache("reproduce", "sdd-cifar100", *words)
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert not out.exists()


def test_pairs_are_part_of_the_command_that_makes_the_table_again():
    asked = options("sdd-cifar100")._replace(pairs=("resnet32x4:resnet8x4",), runs=3)
    assert asked.command == (
        "kd-cache reproduce sdd-cifar100 --pair resnet32x4:resnet8x4 --seeds 3"
    )
