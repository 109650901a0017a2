"""Bad input gets one line and its exit code, never a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from support.builds import build_document, record_toy, write_file
from support.command import kd_cache

TRAIN = {
    "dataset": {"name": "support.toys:patches", "args": {"num_samples": 96}},
    "student": {"model": "support.toys:tiny_net", "model_args": {"width": 6}},
    "method": {"name": "kd"},
    "optimizer": {"name": "sgd", "lr": 0.01},
    "epochs": 1,
    "batch_size": 16,
    "workers": 0,
    "device": "cpu",
}


OTHERS = {
    "TOPK": {"codec": {"kind": "topk", "k": 3}},
    "MIXED": {"augment": {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}]}},
}
"""Further caches, and what is different about them."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("recorded") / "c"
    record_toy(str(path), seeds="0:2")
    return str(path)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    urls = {name: str(folder / name.lower()) for name in OTHERS}
    for name, changes in OTHERS.items():
        record_toy(urls[name], seeds="0:2", **changes)
    return urls


def one_line(ended, code: int) -> str:
    assert ended.code == code, ended
    assert "Traceback" not in ended.err
    lines = [line for line in ended.err.strip().splitlines() if not line.startswith("{")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error[")
    return lines[0]


BUILD_MISTAKES = {
    "an unknown key": ({"sedes": "0:1"}, 2, ["sedes: unknown key", "did you mean seeds?"]),
    "a nested unknown key": ({"teacher__modle": "x"}, 2, ["teacher.modle", "model"]),
    "a missing model": ({"teacher": {}}, 2, ["teacher.model: missing"]),
    "an unknown op": (
        {"augment": {"size": 16, "ops": [{"op": "rotate"}]}},
        2,
        ["augment.ops.0", "rotate", "pad_crop"],
    ),
    "an unknown preset": ({"augment": {"size": 16, "preset": "cfar"}}, 2, ["cfar", "cifar"]),
    "an unknown codec": ({"codec": {"kind": "zip"}}, 2, ["codec", "zip", "dense"]),
    "top-k of every class": ({"codec": {"kind": "topk", "k": 5}}, 2, ["k=5", "dense"]),
    "top-k with no room for labels": ({"codec": {"kind": "topk", "k": 2}}, 2, ["codec.k", "3"]),
    "scales that do not start at 1": ({"scales": [2, 4]}, 2, ["scales", "start at 1"]),
    "an empty range of seeds": ({"seeds": "3:3"}, 2, ["seeds", "3:3"]),
    "an unknown dataset": ({"dataset": {"name": "cifra"}}, 2, ["cifra", "folder"]),
    "a missing image folder": (
        {"dataset": {"name": "folder", "root": "/nowhere/at/all"}},
        2,
        ["/nowhere/at/all"],
    ),
    "an unknown teacher": (
        {"teacher": {"model": "resnet8x5", "pretrained": True}},
        2,
        ["resnet8x5", "resnet8x4"],
    ),
    "a missing checkpoint": (
        {"teacher": {"model": "resnet8x4", "checkpoint": "/no/such.safetensors"}},
        2,
        ["/no/such.safetensors"],
    ),
    "too few classes": (
        {
            "teacher": {
                "model": "support.toys:tiny_net",
                "num_classes": 3,
                "allow_untrained": True,
            }
        },
        2,
        ["3 classes", "5"],
    ),
    "an unknown device": ({"device": "tpu9"}, 2, ["tpu9"]),
    "an untrained teacher": ({"teacher__allow_untrained": False}, 3, ["untrained", "guessing"]),
    "an unknown storage": ({"cache": "ftp://host/x"}, 2, ["ftp"]),
}


@pytest.mark.parametrize(
    ("change", "code", "words"), BUILD_MISTAKES.values(), ids=BUILD_MISTAKES.keys()
)
def test_a_mistake_in_a_build_file_is_one_line(tmp_path, change, code, words):
    cache = str(tmp_path / "c")
    file = write_file(tmp_path / "b.yaml", build_document(cache, **change))
    line = one_line(kd_cache("build", str(file)), code)
    for word in words:
        assert word in line
    assert not Path(cache).exists()


TOKENS = {
    "model": "distill.tokens:vit_tokens",
    "model_args": {
        "backbone": "vit_tiny_patch16_224",
        "num_tokens": 3,
        "img_size": 16,
        "patch_size": 8,
        "depth": 1,
        "embed_dim": 12,
        "num_heads": 1,
    },
}
PEER = {"method": {"name": "peers"}}
TRAIN_MISTAKES = {
    "an unknown key": ({"epocs": 3}, 2, ["epocs", "epochs"]),
    "an unknown method": ({"method": {"name": "sd-kdd"}}, 2, ["sd-kdd", "sd-kd"]),
    "a temperature of zero": ({"method": {"name": "kd", "temperature": 0}}, 2, ["temperature"]),
    "a negative temperature": ({"method": {"name": "dkd", "temperature": -1}}, 2, ["temperature"]),
    "scales that are not recorded": (
        {"method": {"name": "sd-kd", "scales": [1, 4]}},
        2,
        ["4"],
    ),
    "a cache that is not there": ({"caches": "/no/cache"}, 2, ["no cache at /no/cache"]),
    "a seed outside the recording": ({"seeds": "0:9"}, 4, ["2:9", "0:2"]),
    "another fingerprint": (
        {"caches": {"url": "RECORDED", "fingerprint": "0" * 64}},
        3,
        ["fingerprint", "0" * 64],
    ),
    "another dataset": (
        {"dataset": {"name": "support.toys:patches", "args": {"num_samples": 96, "salt": 2}}},
        3,
        ["sha256"],
    ),
    "an unknown student": (
        {"student": {"model": "resnet8x5"}},
        2,
        ["resnet8x5", "resnet8x4"],
    ),
    "a temperature of yes": (
        {"method": {"name": "kd", "temperature": True}},
        2,
        ["method.temperature", "should be a number or a schedule, got true"],
    ),
    "a temperature that falls to zero": (
        {
            "method": {
                "name": "dist",
                "temperature": {"schedule": "linear", "start": 4, "end": 0, "epochs": 1},
            }
        },
        2,
        ["method.temperature.end", "greater than 0"],
    ),
    "tokens for other teachers": (
        {"caches": ["RECORDED", "RECORDED"], "method": {"name": "hard"}, "student": TOKENS},
        2,
        ["2 teachers by 1 or 2 heads", "which has 3"],
    ),
    "a head for each teacher of a student without": (
        {"caches": ["RECORDED", "RECORDED"], "method": {"name": "soft", "heads": "each"}},
        2,
        ["heads=each", "num_tokens: 2"],
    ),
    "two teachers for one": (
        {"caches": ["RECORDED", "TOPK"], "method": {"name": "sd-dkd"}},
        2,
        ["learns from one teacher", "names 2"],
    ),
    "teachers of two recipes": (
        {"caches": ["RECORDED", "MIXED"], "method": {"name": "ensemble"}},
        3,
        ["another recipe", "mixup"],
    ),
    "cells of a student that has none": (
        {"method": {"name": "sd-nkd"}, "student": TOKENS},
        2,
        ["vit_tiny_patch16_224", "scales: [1]"],
    ),
    "logits that were dropped": (
        {"caches": "TOPK", "method": {"name": "logits"}},
        2,
        ["method logits", "keeps only the largest"],
    ),
    "a spread of logits that were dropped": (
        {"caches": "TOPK", "method": {"name": "sd-kd", "standardize": True}},
        2,
        ["method sd-kd with standardize", "keeps only the largest"],
    ),
    "mixed views for one class": (
        {"caches": "MIXED", "method": {"name": "cs-kd"}},
        2,
        ["method cs-kd", "mixes samples"],
    ),
    "a single seed for two views": (
        {"seeds": "0:1", "method": {"name": "ddgsd"}},
        2,
        ["takes two seeds", "0:1"],
    ),
    "a specialist in every class": (
        {"method": {"name": "specialist", "classes": [0, 1, 2, 3, 4]}},
        2,
        ["leaves at least one out"],
    ),
    "peers that are alike": (
        {"students": [{"name": "a", **PEER}, {"name": "b", **PEER}]},
        2,
        ["students a and b", "seed"],
    ),
}


@pytest.mark.parametrize(
    ("change", "code", "words"), TRAIN_MISTAKES.values(), ids=TRAIN_MISTAKES.keys()
)
def test_a_mistake_in_a_train_file_is_one_line_before_anything_is_read_or_written(
    tmp_path, recorded, others, change, code, words, monkeypatch
):
    monkeypatch.setattr(
        "distill.stream.ReplayedStream.batches", None
    )  # would fail if it were called
    out = tmp_path / "out"
    document = {"caches": recorded, **TRAIN, "out": str(out), **change}
    text = yaml.safe_dump(document)
    for name, url in {"RECORDED": recorded, **others}.items():
        text = text.replace(name, url)
    file = tmp_path / "t.yaml"
    file.write_text(text)
    line = one_line(kd_cache("train", str(file)), code)
    for word in words:
        assert word in line
    assert not out.exists()


def test_a_file_that_is_not_there_and_one_that_is_not_yaml_are_one_line(tmp_path):
    assert "/no/such.yaml" in one_line(kd_cache("build", "/no/such.yaml"), 2)
    file = tmp_path / "b.yaml"
    file.write_text("cache: [1, 2\nseeds: 0:1\n")
    assert "line" in one_line(kd_cache("build", str(file)), 2)


def test_an_override_that_is_a_typo_is_one_line(tmp_path):
    file = write_file(tmp_path / "b.yaml", build_document(str(tmp_path / "c")))
    line = one_line(kd_cache("build", str(file), "--set", "codec.knd=int8"), 2)
    assert "codec" in line
    assert "knd" in line


@pytest.mark.parametrize("part", ["3", "a/b", "5/4", "1/0"])
def test_a_part_that_does_not_exist_is_one_line(tmp_path, part):
    file = write_file(tmp_path / "b.yaml", build_document(str(tmp_path / "c")))
    assert part in one_line(kd_cache("build", str(file), "--shard", part), 2)


def test_an_unreadable_image_is_named_with_its_path(tmp_path):
    for label in ("a", "b"):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for index in range(40):
            Image.new("RGB", (20, 20), (index, 0, 0)).save(folder / f"{index:02d}.png")
    broken = tmp_path / "images" / "b" / "17.png"
    broken.write_bytes(broken.read_bytes()[:60])
    document = build_document(
        str(tmp_path / "c"),
        dataset={"name": "folder", "root": str(tmp_path / "images")},
        seeds="0:1",
    )
    file = write_file(tmp_path / "b.yaml", document)
    assert str(broken) in one_line(kd_cache("build", str(file)), 3)


def test_a_checkpoint_that_does_not_fit_names_the_key(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"stem.0.weight": torch.zeros(4, 3, 3, 3)}, path)
    document = build_document(
        str(tmp_path / "c"),
        teacher={"model": "support.toys:tiny_net", "checkpoint": str(path)},
    )
    file = write_file(tmp_path / "b.yaml", document)
    line = one_line(kd_cache("build", str(file)), 2)
    assert "stem.0" in line or "head" in line
    assert str(path) in line


def test_a_cache_of_another_teacher_is_refused_naming_both(tmp_path, recorded):
    document = build_document(recorded, seeds="0:1", teacher__model_args={"scale": 3.0})
    file = write_file(tmp_path / "b.yaml", document)
    line = one_line(kd_cache("build", str(file)), 3)
    assert "teacher." in line
    assert "was recorded with" in line


def test_info_of_a_folder_without_a_cache_is_one_line(tmp_path):
    assert str(tmp_path) in one_line(kd_cache("info", str(tmp_path)), 2)


def test_verify_says_corrupt_with_3_incomplete_with_4_and_repair_heals(tmp_path):
    url = str(tmp_path / "c")
    record_toy(url, seeds="0:2")
    assert kd_cache("verify", url).code == 0
    target = tmp_path / "c" / "logits" / "c" / "1" / "2" / "0" / "0"
    content = bytearray(target.read_bytes())
    content[100] ^= 1
    target.write_bytes(content)
    ended = kd_cache("verify", url, "--json")
    assert ended.code == 3
    report = json.loads(ended.out)
    assert not report["accepted"]
    assert report["audit"]["damaged"][0][:2] == [1, 2]
    assert kd_cache("verify", url, "--repair").code == 3
    assert kd_cache("verify", url).code == 4
    file = write_file(tmp_path / "b.yaml", build_document(url))
    assert kd_cache("build", str(file)).code == 0
    assert kd_cache("verify", url, "--recompute", "40").code == 0


def test_json_of_every_reporting_command_is_one_document(tmp_path, recorded):
    file = write_file(tmp_path / "b.yaml", build_document(recorded))
    for command in (["plan", str(file)], ["build", str(file)], ["info", recorded]):
        ended = kd_cache(*command, "--json")
        assert ended.code == 0, ended
        assert isinstance(json.loads(ended.out), dict)


def test_a_seed_that_lost_its_only_shard_is_missed_by_verify(tmp_path):
    url = str(tmp_path / "c")
    record_toy(url, seeds="1:4", layout={"shard_rows": 96, "chunk_rows": 8})
    assert kd_cache("verify", url).code == 0
    (tmp_path / "c" / "commits" / "2" / "0.json").unlink()
    ended = kd_cache("verify", url)
    assert ended.code == 4
    assert "incomplete: seed 2 lacks 1 shards" in ended.out
