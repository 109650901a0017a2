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

BUILDS = BuildsConfig.model_validate(builds_document(threads=2))


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
        ({"seeds": "999:1001"}, "the largest seed is 1000; this server takes at most 999"),
        ({"augment": {"preset": "cifar", "size": 513}}, r"augment\.size is 513; .* at most 512"),
        (
            {"augment": {"size": 16, "ops": [{"op": "pad_crop"}, *[{"op": "color_jitter"}] * 16]}},
            r"the number of augment\.ops is 17; .* at most 16",
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


PATTERN = r"\s+String should match pattern"
UNKNOWN = r"\s+Extra inputs are not permitted"
LEAST = r"\s+Input should be greater than or equal to "
MOST = r"\s+Input should be less than or equal to "


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cache": "../other"}, "cache" + PATTERN),
        ({"cache": "a/b"}, "cache" + PATTERN),
        ({"cache": ".kd-cache"}, "cache" + PATTERN),
        ({"cache": ""}, "cache" + PATTERN),
        ({"cache": "x" * 129}, "cache" + PATTERN),
        ({"cache": "a\n"}, "cache" + PATTERN),
        ({"teacher": "/secret/place/of.pt"}, "teacher" + PATTERN),
        ({"teacher": {"model": "resnet18"}}, r"teacher\s+Input should be a valid string"),
        ({"dataset": "torch/cifar10"}, "dataset" + PATTERN),
        ({"priority": 101}, "priority" + MOST + "100"),
        ({"priority": -101}, "priority" + LEAST + "-100"),
        ({"seeds": "0:2000000000"}, "names more than 1000 seeds"),
        ({"seeds": ["0:900", "0:900"]}, "names more than 1000 seeds"),
        ({"seeds": list(range(1001))}, "names more than 1000 seeds"),
        ({"seeds": [["0:2000000000"]]}, "seeds are written as 0:30"),
        ({"seeds": [{}]}, "seeds are written as 0:30"),
        ({"seeds": []}, "seeds is an empty list"),
        ({"seeds": "3:3"}, "seeds '3:3' names no seed"),
        ({"seeds": -1}, "seeds -1 is not of the form 0:30"),
        ({"seeds": 1.5}, "seeds are written as 0:30"),
        ({"seeds": None}, "seeds are written as 0:30"),
        ({"seeds": "9" * 5000}, r"seeds\s+Value error, Exceeds the limit"),
        ({"device": "cuda:0"}, "device" + UNKNOWN),
        ({"batch_size": 4}, "batch_size" + UNKNOWN),
        ({"scales": [65]}, "scales.0" + MOST + "64"),
    ],
)
def test_a_request_out_of_form_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
        wanted(**changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"devices": []}, r"devices\s+Tuple should have at least 1 item"),
        ({"devices": ["cpu", "cpu"]}, "names a device twice: cpu, cpu"),
        ({"devices": ["tpu"]}, "devices.0" + PATTERN),
        ({"devices": ["cuda:"]}, "devices.0" + PATTERN),
        ({"teachers": {"a/b": {"model": "x"}}}, "teachers.a/b.*" + PATTERN),
        ({"teachers": {"a": {}}}, r"teachers.a.model\s+Field required"),
        ({"datasets": {"": {"name": "digits"}}}, "datasets.*" + PATTERN),
        ({"database": ""}, r"database\s+String should have at least 1 character"),
        ({"batch_size": 0}, "batch_size" + LEAST + "1"),
        ({"batch_size": 65537}, "batch_size" + MOST + "65536"),
        ({"workers": -1}, "workers" + LEAST + "0"),
        ({"workers": 257}, "workers" + MOST + "256"),
        ({"threads": 0}, "threads" + LEAST + "1"),
        ({"threads": 1025}, "threads" + MOST + "1024"),
        ({"stall_s": 0}, r"stall_s\s+Input should be greater than 0"),
        ({"max_queued": 0}, "max_queued" + LEAST + "1"),
        ({"max_queued": 100_001}, "max_queued" + MOST + "100000"),
        ({"limits": {"max_kept": 5}}, "max_kept is a constant of the service, 1000; leave it out"),
        ({"limits": {"max_seeds": 5}}, "max_seeds is a constant of the service, 1000"),
        ({"limits": {"max_view_size": 5}}, "max_view_size is a constant of the service, 512"),
        ({"limits": {"max_ops": 5}}, "max_ops is a constant of the service, 16"),
        ({"limits": {"max_queued": 5}}, "write `builds: {max_queued: ...}`"),
        ({"queue": 3}, "queue" + UNKNOWN),
    ],
)
def test_a_configuration_out_of_bounds_is_refused(changes, said):
    with pytest.raises(ValidationError, match=said):
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
