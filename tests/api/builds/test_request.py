"""What may be asked for, and that a refusal tells nothing of the server's files."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError
from support.build_queue import builds_document, request_document, wanted

from cache_service.api.builds.request import build_config
from cache_service.api.http.settings import BuildsConfig
from cache_service.errors import ConfigError

BUILDS = BuildsConfig.model_validate(
    builds_document(limits={"max_seeds": 100, "max_view_size": 64, "max_ops": 3}, threads=2)
)


def config_of(**changes):
    return build_config(wanted(**changes), BUILDS, cache_url="/data/toy", device="cuda:1")


def test_a_request_becomes_the_build_file_that_the_operator_would_have_written():
    config = config_of(seeds=["0:2", 5])
    assert config.cache == "/data/toy"
    assert config.teacher == BUILDS.teachers["tiny"]
    assert config.dataset == BUILDS.datasets["patches"]
    assert (config.seeds, config.scales) == ((0, 1, 5), (1, 2))
    assert (config.device, config.batch_size, config.threads) == ("cuda:1", 16, 2)
    assert (config.processes, config.workers) == (1, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "tinny"}, r"teacher 'tinny' is not one of this server's: did you mean tiny"),
        ({"teacher": "x"}, "known here: lost, tiny, wide"),
        ({"dataset": "imagenet"}, "dataset 'imagenet' is not one .*: known here: patches"),
        ({"seeds": "99:101"}, "the largest seed is 100; this server takes at most 99"),
        ({"augment": {"preset": "cifar", "size": 65}}, r"augment\.size is 65; .* at most 64"),
        (
            {"augment": {"size": 16, "ops": [{"op": "pad_crop"}, *[{"op": "color_jitter"}] * 3]}},
            r"the number of augment\.ops is 4; .* at most 3",
        ),
        ({"augment": {"size": 16, "callable": "os:system"}}, r"augment\.callable names code"),
        ({"scales": [2, 4]}, "this request: scales: must start at 1"),
    ],
)
def test_a_request_beyond_the_configuration_is_refused_without_telling_paths(changes, said):
    with pytest.raises(ConfigError, match=said) as refusal:
        config_of(**changes)
    assert "secret" not in str(refusal.value)
    assert "support.toys" not in str(refusal.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"cache": "../other"},
        {"cache": "a/b"},
        {"cache": ".kd-cache"},
        {"cache": ""},
        {"cache": "x" * 129},
        {"cache": "a\n"},
        {"teacher": "/secret/place/of.pt"},
        {"teacher": {"model": "resnet18"}},
        {"dataset": "torch/cifar10"},
        {"priority": 101},
        {"priority": -101},
        {"seeds": "0:2000000000"},
        {"seeds": ["0:90000", "90000:200000"]},
        {"seeds": list(range(100_001))},
        {"seeds": [["0:2000000000"]]},
        {"seeds": [{}]},
        {"seeds": []},
        {"seeds": "3:3"},
        {"seeds": -1},
        {"seeds": 1.5},
        {"seeds": None},
        {"seeds": "9" * 5000},
        {"device": "cuda:0"},
        {"batch_size": 4},
        {"scales": [65]},
    ],
)
def test_a_request_out_of_form_is_refused(changes):
    with pytest.raises(ValidationError):
        wanted(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"devices": []},
        {"devices": ["cpu", "cpu"]},
        {"devices": ["tpu"]},
        {"devices": ["cuda:"]},
        {"teachers": {"a/b": {"model": "x"}}},
        {"teachers": {"a": {}}},
        {"datasets": {"": {"name": "digits"}}},
        {"database": ""},
        {"batch_size": 0},
        {"batch_size": 65537},
        {"workers": -1},
        {"workers": 257},
        {"threads": 0},
        {"threads": 1025},
        {"stall_s": 0},
        {"limits": {"max_queued": 0}},
        {"limits": {"max_queued": 100_001}},
        {"limits": {"max_kept": 0}},
        {"limits": {"max_kept": 100_001}},
        {"limits": {"max_seeds": 0}},
        {"limits": {"max_seeds": 100_001}},
        {"limits": {"max_view_size": 7}},
        {"limits": {"max_view_size": 4097}},
        {"limits": {"max_ops": 0}},
        {"limits": {"max_ops": 257}},
        {"queue": 3},
    ],
)
def test_a_configuration_out_of_bounds_is_refused(changes):
    with pytest.raises(ValidationError):
        BuildsConfig.model_validate(builds_document(**changes))


def test_requests_are_checked_and_queued_without_torch_or_pillow():
    script = (
        "import sys, cache_service.api.builds.routes\n"
        "heavy = {'torch', 'torchvision', 'timm', 'PIL', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_document_of_a_request_reads_back():
    assert wanted(**request_document()) == wanted()
