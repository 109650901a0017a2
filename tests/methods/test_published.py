"""The published settings: each value with its place in the authors' code or paper."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from support.builds import record_toy
from support.toys import patches, tiny_net

from cache_service.config import validate_config
from cache_service.errors import ConfigError
from cache_service.models.features import pool_cells
from cache_service.recording.build_config import BuildConfig
from distill.config import TrainConfig
from distill.data import CachedDataset, load_cache
from distill.methods import METHODS, MethodConfig
from distill.methods.published import PUBLISHED, published_of
from distill.methods.scale_decoupled import select_cells

BUILD = {
    "cache": "unused",
    "dataset": {"name": "digits"},
    "augment": {"preset": "none", "size": 8},
    "teacher": {"model": "resnet8x4", "allow_untrained": True},
    "seeds": "0",
}
TRAIN = {
    "dataset": {"name": "digits"},
    "caches": "unused",
    "student": {"model": "resnet8x4"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "epochs": 1,
    "batch_size": 8,
    "out": "unused",
}


def row_of(method, data, source, **settings):
    (row,) = [
        each
        for each in published_of(method)
        if each.data == data
        and each.source.startswith(source)
        and settings.items() <= dict(each.method).items()
    ]
    return row


def values(row):
    return {key: value for key, value in row.method.items() if key != "name"}


DKD_BETA_6 = "CIFAR-100, vgg13 -> any, wrn_40_2 -> wrn_16_2, wrn_40_1 or MobileNetV2"
DKD_BETA_2 = "CIFAR-100, resnet56 -> resnet20, resnet110 -> resnet32"
R34_R18 = "ImageNet, ResNet34 -> ResNet18"
R50_MV1 = "ImageNet, ResNet50 -> MobileNetV1"


def test_kd_of_the_cifar_tables():
    # mdistiller, engine/cfg.py: KD.TEMPERATURE 4, CE_WEIGHT 0.1, KD_WEIGHT 0.9.
    row = row_of("kd", "CIFAR-100", "mdistiller")
    assert values(row) == {"temperature": 4, "alpha": 0.9}


def test_logit_standardization_has_its_own_temperature_and_weights():
    # README of logit-standardization-KD: --logit-stand --base-temp 2 --kd-weight 9, label loss 0.1.
    kd = row_of("kd", "CIFAR-100", "logit-standardization")
    assert values(kd) == {"standardize": True, "temperature": 2, "alpha": 0.989}
    assert kd.method["alpha"] == pytest.approx(9 / (0.1 + 9), abs=1e-4)
    # The same options scale alpha 1 and beta 8 of DKD by 9; warm-up as in mdistiller.
    assert values(row_of("dkd", "CIFAR-100", "logit-standardization")) == {
        "standardize": True,
        "temperature": 2,
        "alpha": 9,
        "beta": 72,
        "warmup_epochs": 20,
    }


@pytest.mark.parametrize(
    ("data", "temperature", "beta", "warmup_epochs"),
    [
        ("CIFAR-100", 4, 8, 20),  # configs/cifar100/dkd
        (DKD_BETA_6, 4, 6, 20),
        (DKD_BETA_2, 4, 2, 20),
        (R34_R18, 1, 0.5, 1),  # configs/imagenet/r34_r18/dkd.yaml
        (R50_MV1, 1, 2, 1),
    ],
)
def test_dkd_of_mdistiller(data, temperature, beta, warmup_epochs):
    assert values(row_of("dkd", data, "mdistiller")) == {
        "temperature": temperature,
        "alpha": 1,
        "beta": beta,
        "warmup_epochs": warmup_epochs,
    }


@pytest.mark.parametrize(
    ("data", "temperature", "gamma"),
    [
        ("CIFAR-100, ResNet34 -> ResNet18", 3, 3.5),  # cifar100/res34_distill_res18_cifar.py
        ("ImageNet", 1, 1.5),  # imagenet/res34_distill_res18_img.py
    ],
)
def test_nkd_of_its_authors_has_no_warm_up(data, temperature, gamma):
    assert values(row_of("nkd", data, "cls_KD")) == {
        "temperature": temperature,
        "gamma": gamma,
        "classes": "others",
        "warmup_epochs": 0,
    }


def test_nkd_in_the_tables_of_sdd():
    row = row_of("nkd", "CIFAR-100, the NKD columns of SDD", "SDD")
    assert (row.method["temperature"], row.method["gamma"], row.method["classes"]) == (
        1,
        1.5,
        "all",
    )
    assert (row.method["warmup_epochs"], row.train) == (20, {"clip_grad_norm": 40})


@pytest.mark.parametrize(("data", "temperature"), [("CIFAR-100", 4), ("ImageNet", 1)])
def test_dist_weighs_both_terms_by_two_everywhere(data, temperature):
    # image_classification_sota: dist_cifar.yaml has dist_t4, resnet_dist.yaml dist (T = 1), both
    # with a loss weight of 2 on DIST(beta=1, gamma=1).
    row = row_of("dist", data, "DIST")
    assert values(row) == {"temperature": temperature, "beta": 2, "gamma": 2}


@pytest.mark.parametrize(
    ("networks", "scales"), [("like networks", [1, 2]), ("unlike networks", [1, 2, 4])]
)
def test_sdd_on_cifar(networks, scales):
    # engine/cfg.py and the commands in teacher_*.sh (--M); DKD: T 4, alpha 1, beta 8, warm-up 20.
    kd, dkd, nkd = (
        row_of(name, f"CIFAR-100, {networks}", "SDD") for name in ("sd-kd", "sd-dkd", "sd-nkd")
    )
    assert values(kd) == {"temperature": 4, "alpha": 0.9}
    assert values(dkd) == {"temperature": 4, "alpha": 1, "beta": 8, "warmup_epochs": 20}
    assert values(nkd) == {"temperature": 4, "gamma": 8, "warmup_epochs": 20}
    assert [row.build for row in (kd, dkd, nkd)] == [{"scales": scales}] * 3


@pytest.mark.parametrize(("data", "value"), [(DKD_BETA_6, 6), (DKD_BETA_2, 2)])
def test_gamma_of_sd_nkd_is_the_beta_of_sd_dkd(data, value):
    assert row_of("sd-dkd", data, "SDD").method["beta"] == value
    assert row_of("sd-nkd", data, "SDD").method["gamma"] == value


@pytest.mark.parametrize(("data", "value", "scales"), [(R34_R18, 0.5, [1, 2]), (R50_MV1, 2, None)])
def test_sdd_on_imagenet_pools_its_grids_from_4_x_4(data, value, scales):
    # configs/imagenet/*/sdd_dkd.yaml, sdd_nkd.yaml: T 1, WARMUP 1, BETA 0.5 or 2. sdd_kd.yaml has
    # no KD section, so T 4, 0.1 and 0.9 of engine/cfg.py hold.
    dkd, nkd, kd = (row_of(name, data, "SDD") for name in ("sd-dkd", "sd-nkd", "sd-kd"))
    assert (dkd.method["temperature"], dkd.method["beta"], dkd.method["alpha"]) == (1, value, 1)
    assert (nkd.method["temperature"], nkd.method["gamma"]) == (1, value)
    assert (dkd.method["warmup_epochs"], nkd.method["warmup_epochs"]) == (1, 1)
    assert (kd.method["temperature"], kd.method["alpha"]) == (4, 0.9)
    for row in (kd, dkd, nkd):
        assert (row.method.get("scales"), row.build) == (scales, {"scales": "sdd"})


def test_every_run_of_sdd_clips_gradients_at_40():
    # engine/trainer.py: clip_grad_norm_(parameters, max_norm=40, norm_type=2). No other code does.
    assert {row.source for row in PUBLISHED if row.train} == {"SDD"}
    sdd = [row for row in PUBLISHED if row.source == "SDD"]
    assert len(sdd) == 17
    assert all(row.train == {"clip_grad_norm": 40} for row in sdd)


def test_methods_of_several_teachers():
    # DeiT, main.py: --distillation-tau and alpha of the paper's section 5.2.
    assert values(row_of("soft", "ImageNet", "DeiT")) == {"temperature": 3, "alpha": 0.1}
    assert values(row_of("hard", "ImageNet", "DeiT")) == {"temperature": 1, "alpha": 0.5}


def test_methods_without_a_better_teacher():
    # Teacher-free-KD, README: reg_T 20, reg_alpha 0.1, multiplier 100; self: T 6, alpha 0.95, 50.
    virtual = row_of("tf-kd", "CIFAR-100, ResNet-18", "Teacher-free-KD", form="virtual")
    assert (virtual.method["temperature"], virtual.method["alpha"]) == (20, 0.1)
    assert virtual.method["correct"] == 0.99
    own = row_of("tf-kd", "CIFAR-100, ResNet-18", "Teacher-free-KD", form="self")
    assert (own.method["temperature"], own.method["alpha"]) == (6, 0.905)
    assert own.method["alpha"] == pytest.approx(0.95 * 50 / 100 / 0.525, abs=1e-3)
    # Xu and Liu, section 4: lambda 1, mu 5e-4. PS-KD, main.py: alpha_T 0.8. cs-kd, train.py:
    # temp 4, lamda 1. Zhang et al.: T = 1, weight 1.
    assert values(row_of("ddgsd", "CIFAR-100", "Xu and Liu")) == {
        "temperature": 1,
        "consistency": 1,
        "mmd": 5e-4,
    }
    assert values(row_of("ps-kd", "CIFAR-100", "PS-KD")) == {"final_alpha": 0.8}
    assert values(row_of("cs-kd", "CIFAR-100", "cs-kd")) == {"temperature": 4, "consistency": 1}
    assert values(row_of("peers", "CIFAR-100", "deep mutual")) == {"temperature": 1, "weight": 1}


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row.name}-{index}") for index, row in enumerate(PUBLISHED)]
)
def test_published_settings_are_files_that_the_commands_take(row):
    train = validate_config(TrainConfig, TRAIN | {"method": row.method, **row.train}, where="row")
    assert train.method.name == row.name
    build = validate_config(BuildConfig, BUILD | dict(row.build), where="row")
    wanted = [1, 2, 4] if row.build == {"scales": "sdd"} else row.build.get("scales", [1])
    assert list(build.scales) == wanted


def test_two_rows_never_have_the_same_place():
    places = [(row.name, row.data, row.source, row.method.get("form")) for row in PUBLISHED]
    assert len(set(places)) == len(places)


NOT_PUBLISHED = {"specialist", "ensemble", "logits", "ce"}
"""Methods whose sources leave the settings open or have none."""


def test_every_other_method_has_published_settings():
    assert {row.name for row in PUBLISHED} == METHODS.keys() - NOT_PUBLISHED


HAVE_OTHER_DEFAULTS = {"dist", "nkd"}
"""Defaults of the authors' class that no run of theirs has, and a warm-up that they do not have."""


@pytest.mark.parametrize("name", sorted(METHODS.keys() - NOT_PUBLISHED - HAVE_OTHER_DEFAULTS))
def test_the_defaults_are_those_of_a_published_row(name):
    adapter = TypeAdapter(MethodConfig)
    default = adapter.validate_python({"name": name})
    assert default in [adapter.validate_python(dict(row.method)) for row in published_of(name)]


def sdd_cells(map_BDHW, sides):
    """Cells as the networks of SDD pool them: 4 x 4 first, and the others from that."""
    finest = F.adaptive_avg_pool2d(map_BDHW, 4)
    cells = [F.adaptive_avg_pool2d(finest, side).flatten(2) for side in sides]
    return torch.cat(cells, dim=2).transpose(1, 2)


@pytest.mark.parametrize("sides", [(1, 2), (1, 2, 4)])
def test_scales_sdd_gives_the_cells_of_its_networks_on_a_7_x_7_map(sides):
    build = validate_config(BuildConfig, BUILD | {"scales": "sdd"}, where="build")
    map_BDHW = torch.randn(2, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    recorded = pool_cells(map_BDHW, build.scales, pooling=build.teacher.pooling)
    cells = select_cells(recorded, build.scales, sides)
    torch.testing.assert_close(cells, sdd_cells(map_BDHW, sides))
    for pooling in ("direct", "chained"):  # what a user would write without knowing of it
        other = pool_cells(map_BDHW, (1, 2), pooling=pooling)
        assert not torch.allclose(other, sdd_cells(map_BDHW, (1, 2)), atol=1e-3)


@pytest.mark.parametrize("codec", [{"kind": "dense"}, {"kind": "features"}])
def test_a_recording_with_scales_sdd_holds_the_logits_that_sdd_computes(tmp_path, codec):
    toys = {"num_samples": 16, "side": 28}  # a map of 7 x 7, as of ImageNet's networks
    view = {"augment__size": 28, "augment__preset": "none", "dataset__args": toys}
    cache = record_toy(str(tmp_path / "cache"), scales="sdd", seeds="0", codec=codec, **view)
    assert cache.spec.stored_scales == (4,)  # the coarser cells follow from it, and cost nothing
    data = CachedDataset(load_cache(str(tmp_path / "cache")), images=patches(**toys), seed=0)
    images, _, recorded = (
        torch.stack([torch.as_tensor(x) for x in column]) for column in zip(*data, strict=True)
    )
    preprocess, net = cache.spec.teacher.preprocess, tiny_net().eval()
    mean, std = (torch.tensor(part)[:, None, None] for part in (preprocess.mean, preprocess.std))
    with torch.no_grad():
        map_BDHW = net.forward_features((images - mean) / std)
        wanted = net.head(sdd_cells(map_BDHW, (1, 2, 4)))
        direct = net.head(pool_cells(map_BDHW, (1, 2, 4)))
    assert map_BDHW.shape[-2:] == (7, 7)
    torch.testing.assert_close(recorded, wanted, rtol=2e-3, atol=2e-3)
    assert (direct - wanted).abs().max() > 0.1


def test_an_impulse_in_the_middle_is_spread_as_in_sdd():
    map_BDHW = torch.zeros(1, 1, 7, 7)
    map_BDHW[0, 0, 3, 3] = 49.0
    cells = pool_cells(map_BDHW, (1, 2, 4), pooling="chained")[0, :5, 0]
    assert cells.tolist() == pytest.approx([1.361] * 5, abs=1e-3)
    direct = pool_cells(map_BDHW, (1, 2), pooling="direct")[0, :, 0]
    assert direct.tolist() == pytest.approx([1.0, *[3.0625] * 4])


def test_scales_sdd_is_the_same_build_as_its_long_form():
    short = validate_config(BuildConfig, BUILD | {"scales": "sdd"}, where="build")
    teacher = BUILD["teacher"] | {"pooling": "chained"}
    long = validate_config(
        BuildConfig, BUILD | {"scales": [1, 2, 4], "teacher": teacher}, where="build"
    )
    assert short == long


def test_scales_sdd_with_another_pooling_is_refused():
    document = BUILD | {"scales": "sdd", "teacher": BUILD["teacher"] | {"pooling": "direct"}}
    with pytest.raises(ConfigError, match=r"teacher\.pooling is 'direct'; leave it out"):
        validate_config(BuildConfig, document, where="build")


@pytest.mark.parametrize("scales", ["SDD", "dds", ["sdd"], {"sdd": 1}])
def test_another_word_for_scales_is_refused(scales):
    with pytest.raises(ConfigError, match="scales"):
        validate_config(BuildConfig, BUILD | {"scales": scales}, where="build")
