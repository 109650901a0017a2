from __future__ import annotations

import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from cache_service.errors import ConfigError
from cache_service.models.create import create_model, refuse_unknown_model


def build_small(num_classes=3, pretrained=False, loud=False):
    """A network of your own."""
    if loud:
        sys.stdout.write("hello")
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes))
    model.was_pretrained = pretrained
    return model


def build_fixed():
    """A network whose number of classes is settled."""
    return nn.Linear(12, 4)


NETWORK = nn.Linear(12, 4)


def build_nothing(num_classes):
    """Not a network."""
    return num_classes


@pytest.fixture
def own(monkeypatch):
    """Make this very file importable by a plain name, as a user's module is."""
    monkeypatch.setitem(sys.modules, "own_networks", sys.modules[__name__])
    return "own_networks"


@pytest.mark.parametrize("name", ["resnet8x4", "resnet10t", "torchvision/shufflenet_v2_x0_5"])
def test_a_name_makes_a_network_of_so_many_classes(name):
    model = create_model(name, num_classes=7)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_without_a_number_of_classes_the_network_keeps_its_own():
    assert create_model("resnet8x4", num_classes=None).num_classes == 100


def test_your_own_factory_gets_the_classes_and_arguments(own):
    model = create_model(f"{own}:build_small", num_classes=5)
    assert (model[1].out_features, model.was_pretrained) == (5, False)
    assert create_model(f"{own}:build_small", num_classes=5, pretrained=True).was_pretrained


def test_a_factory_that_takes_no_number_of_classes_is_called_without_it(own):
    assert create_model(f"{own}:build_fixed", num_classes=5).out_features == 4


def test_what_a_factory_prints_does_not_reach_stdout(own, capsys):
    create_model(f"{own}:build_small", num_classes=5, loud=True)
    assert capsys.readouterr() == ("", "hello")


def test_model_arguments_are_passed_on():
    assert create_model("resnet10t", num_classes=7, drop_rate=0.25).drop_rate == 0.25


def test_a_seed_makes_the_same_weights_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second, other = (create_model("resnet20", num_classes=7, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, other.fc.weight)


def test_without_a_seed_the_global_generator_decides():
    torch.manual_seed(4)
    first = create_model("resnet20", num_classes=7)
    second = create_model("resnet20", num_classes=7)
    assert not torch.equal(first.fc.weight, second.fc.weight)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("resnet8x5", {}, "no model 'resnet8x5'. Close to it: resnet8x4"),
        ("vgg8", {}, "Close to it: cifar_vgg8"),
        ("MobileNetV2", {}, "Close to it: cifar_mobilenetv2, mobilenetv2_"),
        ("torchvision/resnet", {}, "Close to it: torchvision/resnet18"),
        ("torchvision.models.vgg13", {}, "Close to it: torchvision/vgg13"),
        ("resnet18_cifar", {}, "Close to it: cifar_resnet18"),
        ("vgg13_bn_cifar", {}, "Close to it: cifar_vgg13"),
        ("vgg8_bn", {}, "Close to it: cifar_vgg8"),
        ("mobile_half", {}, "Close to it: cifar_mobilenetv2"),
        ("CIFAR_ResNet18", {}, "Close to it: cifar_preact_resnet18, cifar_resnet18"),
        ("nets.py", {}, "Name the function in it: nets.py:FUNCTION"),
        ("runs/best.pth", {}, "model 'runs/best.pth' is a file of weights.* as `checkpoint`"),
        ("resnet8.pth", {}, "model 'resnet8.pth' is a file of weights"),
        ("", {}, "no model ''. Models are"),
        ("owner/name", {}, "Use 'hf-hub:owner/name'"),
        ("resnet50.nope", {}, r"Invalid pretrained tag \(nope\) for resnet50\. Check"),
        ("resnet8x4", {"pretrained": True}, "timm has no pretrained weights for resnet8x4"),
        ("resnet8x4", {"wings": 2}, "cannot create resnet8x4: .*unexpected .*'wings'"),
        ("local-dir:/nowhere", {}, "cannot create local-dir:/nowhere: .*config.json"),
        ("torchvision/resnet18", {"pretrained": True}, "answers 1000 classes, not 7. Drop"),
        ("no_such:factory", {}, "'no_such:factory': importing no_such failed: No module"),
        ("own_networks:absent", {}, r"own_networks \(.*test_create.py\) has no 'absent'"),
        ("own_networks:build_nothing", {}, "made a int where a torch.nn.Module is needed"),
        ("own_networks:build_small", {"wings": 2}, r"does not take wings. It .*in model_args\."),
        ("own_networks:build_fixed", {"pretrained": True}, "does not take pretrained"),
        ("own_networks:NETWORK", {}, "is a network, not a function that makes one"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line(name, options, says, own):
    with pytest.raises(ConfigError, match=says) as refusal:
        create_model(name, num_classes=7, **options)
    assert "\n" not in str(refusal.value)


def test_a_factory_in_a_file_or_a_module_of_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "networks_here.py").write_text(
        "from torch import nn\ndef linear(num_classes): return nn.Linear(3, num_classes)\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("networks_here:linear", "networks_here.py:linear"):
        assert create_model(name, num_classes=7).out_features == 7


def test_weights_that_cannot_be_fetched_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConfigError, match="cannot fetch the pretrained weights of resnet18"
    ) as gone:
        create_model("resnet18", num_classes=7, pretrained=True, cache_dir=tmp_path)
    assert "\n" not in str(gone.value)
    assert "checkpoint: FILE" in gone.value.hint


def test_timm_is_asked_for_its_own_pretrained_weights(tmp_path):
    save_file(timm.create_model("test_resnet").state_dict(), tmp_path / "w.safetensors")
    overlay = {"file": str(tmp_path / "w.safetensors")}
    model = create_model(
        "test_resnet.r160_in1k", num_classes=None, pretrained=True, pretrained_cfg_overlay=overlay
    )
    assert model.num_classes == 1000


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet8x4", "resnet50.a1_in1k", "torchvision/resnet18", "hf-hub:a/b"]
)
def test_a_known_name_is_not_refused_without_making_the_network(name):
    refuse_unknown_model(name)


@pytest.mark.parametrize(
    ("name", "close"),
    [("resnt18", "resnet18"), ("torchvision/resnet19", "torchvision/resnet1"), ("", "module")],
)
def test_an_unknown_name_is_refused_before_anything_is_made(name, close):
    with pytest.raises(ConfigError, match="there is no model") as refused:
        refuse_unknown_model(name)
    assert close in refused.value.hint
