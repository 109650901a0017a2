"""The train file: what it takes, and every bound of it."""

from __future__ import annotations

import pytest
import yaml
from support.streams import train_document

from cache_service.config import validate_config
from cache_service.errors import ConfigError
from distill.config import StudentConfig, TrainConfig, load_config
from distill.methods.scale_decoupled import SDKD

AUGMENT = {"preset": "cifar", "size": 32}


def refused(changes, says):
    document = train_document("out", **changes)
    with pytest.raises(ConfigError, match=says) as refusal:
        validate_config(TrainConfig, document, where="train.yaml")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("dataset__name", "", "at least 1 character"),
        ("caches", [""], r"caches\.0\.url: String should have at least 1 character"),
        ("caches", [{"url": "a", "fingerprint": "abc"}], r"caches\.0\.fingerprint: .*pattern"),
        ("seeds", "3:3", "names no seed"),
        ("seeds", [], "empty list"),
        ("seeds", "-1", "not of the form"),
        ("student__model", "", "at least 1 character"),
        ("student__num_classes", 1, "greater than or equal to 2"),
        ("student__checkpoint", "", "at least 1 character"),
        ("student__checkpoint_key", "", "at least 1 character"),
        ("student__checkpoint_key", "teacher", "chooses within student.checkpoint: give it"),
        ("student__checkpoint_weights", "raw", "chooses within student.checkpoint: give it"),
        ("student__checkpoint_weights", "best", "'raw' or 'averaged'"),
        ("student__seed", -1, "greater than or equal to 0"),
        ("student__seed", 2**31, "less than 2147483648"),
        ("student__input_size", 7, "greater than or equal to 8"),
        ("student__input_size", 4097, "less than or equal to 4096"),
        ("student__mean", [0.5, 0.5, 1.5], "less than or equal to 1"),
        ("student__mean", [0.5, 0.5, 0.5], "mean and std are given together"),
        ("student__std", [0.5, 0.5, 0], "greater than 0"),
        ("student__std", [0.5, 0.5, 1.1], "less than or equal to 1"),
        ("student__interpolation", "nearest", "'bilinear' or 'bicubic'"),
        ("student__model_args", {"num_classes": 3}, "model_args cannot hold num_classes"),
        ("student__model_args", {"name": "x"}, "model_args cannot hold name"),
        ("method__name", "kdd", "method: Input tag 'kdd'"),
        ("method__temperature", 0, r"method\.temperature: .*greater than 0"),
        ("method__temperature", 1001, "less than or equal to 1000"),
        ("method__alpha", -0.1, "greater than or equal to 0"),
        ("method__alpha", 1.1, "less than or equal to 1"),
        ("method__scales", [1], r"method\.scales: unknown key"),
        ("optimizer__name", "lion", "optimizer: Input tag 'lion'"),
        ("optimizer__lr", 0, "greater than 0"),
        ("optimizer__lr", 101, "less than or equal to 100"),
        ("optimizer__momentum", -0.1, "greater than or equal to 0"),
        ("optimizer__momentum", 1, "less than 1"),
        ("optimizer__weight_decay", -1, "greater than or equal to 0"),
        ("optimizer__weight_decay", 2, "less than or equal to 1"),
        ("optimizer", {"name": "sgd", "lr": 1, "momentum": 0, "nesterov": True}, "nesterov looks"),
        ("optimizer", {"name": "adamw", "lr": 1, "betas": [0.9, 1]}, "less than 1"),
        ("optimizer", {"name": "adamw", "lr": 1, "betas": [-1, 0.9]}, "or equal to 0"),
        ("optimizer", {"name": "adamw", "lr": 1, "eps": 0}, "greater than 0"),
        ("optimizer", {"name": "adamw", "lr": 1, "eps": 2}, "less than or equal to 1"),
        ("optimizer", {"name": "sgd"}, r"optimizer\.lr: missing"),
        ("schedule", {"name": "linear"}, "schedule: Input tag 'linear'"),
        ("schedule", {"name": "constant", "warmup_epochs": -1}, "greater than or equal to 0"),
        ("schedule", {"name": "constant", "warmup_epochs": 2}, "warmup_epochs=2 leaves nothing"),
        ("schedule", {"name": "cosine", "min_lr": -1}, "greater than or equal to 0"),
        ("schedule", {"name": "cosine", "min_lr": 0.2}, "min_lr=0.2 is above optimizer.lr=0.1"),
        ("schedule", {"name": "multistep"}, r"schedule\.milestones: missing"),
        ("schedule", {"name": "multistep", "milestones": []}, "at least 1 item"),
        ("schedule", {"name": "multistep", "milestones": [0]}, "greater than or equal to 1"),
        ("schedule", {"name": "multistep", "milestones": [5, 5]}, "strictly increase"),
        ("schedule", {"name": "multistep", "milestones": [5], "gamma": 0}, "greater than 0"),
        ("schedule", {"name": "multistep", "milestones": [5], "gamma": 1}, "less than 1"),
        ("epochs", 0, "greater than or equal to 1"),
        ("epochs", 100_001, "less than or equal to 100000"),
        ("batch_size", 0, "greater than or equal to 1"),
        ("batch_size", 2**20 + 1, "less than or equal to 1048576"),
        ("accumulate", 0, "greater than or equal to 1"),
        ("accumulate", 2**16 + 1, "less than or equal to 65536"),
        ("clip_grad_norm", 0, "greater than 0"),
        ("amp", "fp8", "'none', 'bfloat16' or 'float16'"),
        ("ema", 0, "greater than 0"),
        ("ema", 1, "less than 1"),
        ("label_smoothing", -0.1, "greater than or equal to 0"),
        ("label_smoothing", 1, "less than 1"),
        ("device", "tpu", "should match pattern"),
        ("workers", -1, "greater than or equal to 0"),
        ("workers", 257, "less than or equal to 256"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**31, "less than 2147483648"),
        ("out", "", "at least 1 character"),
        ("evaluate", {"dataset": {"name": "digits"}, "every": 0}, "greater than or equal to 1"),
        ("evaluate", {"dataset": {"name": "digits"}, "batch_size": 0}, "or equal to 1"),
        ("evaluate", {}, r"evaluate\.dataset: missing"),
        ("checkpoint_every", {}, "give epochs or steps, one of them"),
        ("checkpoint_every", {"epochs": 1, "steps": 1}, "give epochs or steps, one of them"),
        ("checkpoint_every", {"epochs": 0}, "greater than or equal to 1"),
        ("checkpoint_every", {"steps": 0}, "greater than or equal to 1"),
        ("log_every", 0, "greater than or equal to 1"),
        ("wandb", "", "at least 1 character"),
        ("wandb", "x" * 129, "at most 128 characters"),
        ("replay", {"max_drift": -1}, "greater than or equal to 0"),
        ("replay", {"max_drift": 256}, "less than or equal to 255"),
        ("caches", [], "without caches, augment must say what the views are"),
        ("augment", AUGMENT, "augment is the cache's own recipe"),
        ("studnet", {}, "studnet: unknown key, did you mean student"),
    ],
)
def test_every_bound_is_enforced_and_says_why(key, value, says):
    refused({key: value}, says)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"scales": []}, "at least 1 item"),
        ({"scales": [0]}, "greater than or equal to 1"),
        ({"scales": [1, 65]}, "less than or equal to 64"),
        ({"scales": [2, 4]}, "must start at 1"),
        ({"scales": [1, 4, 2]}, "strictly increase"),
        ({"complementary_weight": -1}, "greater than or equal to 0"),
        ({"complementary_weight": 101}, "less than or equal to 100"),
        ({"temperature": 0}, "greater than 0"),
        ({"temperature": 1001}, "less than or equal to 1000"),
        ({"alpha": -1}, "greater than or equal to 0"),
        ({"alpha": 2}, "less than or equal to 1"),
        ({"scale": [1]}, r"method\.scale: unknown key, did you mean scales"),
    ],
)
def test_every_bound_of_sd_kd_is_enforced(value, says):
    refused({"method": {"name": "sd-kd"} | value}, says)


@pytest.mark.parametrize("key", ["dataset", "student", "method", "optimizer", "epochs", "out"])
def test_what_cannot_be_guessed_must_be_given(key):
    document = train_document("out")
    del document[key]
    with pytest.raises(ConfigError, match=f"{key}: missing"):
        validate_config(TrainConfig, document, where="train.yaml")


def test_a_file_and_overrides_make_a_config(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(train_document("out")))
    config = load_config(
        path, ["method={name: sd-kd, scales: [1, 2]}", "seeds=0:3", "optimizer.lr=1e-2"]
    )
    assert config.method == SDKD(scales=(1, 2))
    assert config.seeds == (0, 1, 2)
    assert config.optimizer.lr == 0.01


def test_one_cache_needs_no_list():
    one = TrainConfig.model_validate(train_document("out", caches="a"))
    several = TrainConfig.model_validate(train_document("out", caches=[{"url": "a"}, "b"]))
    assert [cache.url for cache in one.caches] == ["a"]
    assert [cache.url for cache in several.caches] == ["a", "b"]


def test_a_config_written_out_in_full_reads_as_the_same_config(tmp_path):
    config = TrainConfig.model_validate(
        train_document(
            "out",
            method={"name": "sd-kd", "temperature": 2},
            schedule={"name": "multistep", "milestones": [1]},
            seeds="4:16",
            evaluate={"dataset": {"name": "digits"}, "augment": {"preset": "none", "size": 8}},
        )
    )
    path = tmp_path / "full.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert load_config(path) == config


def test_every_path_of_a_train_file_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    document = {
        **train_document("~/run"),
        "dataset": {"name": "~/d.py:make", "root": "~/data"},
        "caches": ["~/c", {"url": "http://h:1/v1/caches/c", "disk_cache": "~/disk"}],
        "student": {"model": "resnet8x4", "checkpoint": "~/s.pt"},
    }
    document.pop("augment", None)
    config = validate_config(TrainConfig, document, where="t.yaml")
    assert (config.out, config.dataset.name) == ("/home/ann/run", "/home/ann/d.py:make")
    assert (config.dataset.root, config.student.checkpoint) == (
        "/home/ann/data",
        "/home/ann/s.pt",
    )
    assert [(cache.url, cache.disk_cache) for cache in config.caches] == [
        ("/home/ann/c", None),
        ("http://h:1/v1/caches/c", "/home/ann/disk"),
    ]
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ConfigError, match=r"caches\.0\.url: the environment variable 'NOWHERE'"):
        validate_config(TrainConfig, {**document, "caches": "$NOWHERE/c"}, where="t.yaml")


def test_a_checkpoints_key_may_be_a_number():
    config = StudentConfig.model_validate(
        {"model": "resnet8", "checkpoint": "a.pt", "checkpoint_key": 1}
    )
    assert config.checkpoint_key == "1"


@pytest.mark.parametrize("written", ["a", {"url": "a"}, ["a"], [{"url": "a", "wait_s": 3}]])
def test_the_only_cache_has_keys_for_set_however_it_is_written(tmp_path, written):
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(train_document("out", caches=written)))
    url = "http://teacher:8000/v1/caches/c"
    config = load_config(file, [f"caches.url={url}", "caches.wait_s=9"])
    assert [(cache.url, cache.wait_s) for cache in config.caches] == [(url, 9)]


def test_one_of_several_caches_is_set_by_its_number(tmp_path):
    file = tmp_path / "train.yaml"
    file.write_text(yaml.safe_dump(train_document("out", caches=["a", {"url": "b"}])))
    config = load_config(file, ["caches.0.url=c", "caches.1.wait_s=5"])
    assert [(cache.url, cache.wait_s) for cache in config.caches] == [("c", 0), ("b", 5)]
    with pytest.raises(ConfigError, match=r"has 2 caches, and --set caches\.url") as refusal:
        load_config(file, ["caches.url=c"])
    assert refusal.value.hint == "Write caches.0.url=..., counted from 0."
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(file, ["caches.0.uri=c"])


def test_an_evaluation_sees_every_sample_once():
    augment = {"preset": "none", "size": 16, "repeats": 2}
    evaluation = {"dataset": {"name": "digits"}, "augment": augment}
    refused({"evaluate": evaluation}, "augment.repeats must be 1 here")
