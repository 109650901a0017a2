"""What the CIFAR networks share: timm's interface, a head that pools by mean, registration.

Shape letters: B batch, C classes, D channels, H W sides of an image or map in pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR_STD = (0.2675, 0.2565, 0.2761)
"""Channel statistics of the CIFAR-100 training images, in [0, 1] units, as the papers use them."""


class CifarNet(nn.Module):
    """A convolutional network whose head is a mean over the map and one linear layer.

    Submodules keep the names of the published checkpoints, so those load without a key map.
    """

    classifier_name: ClassVar[str] = "fc"

    def __init__(self, *, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.num_classes = num_classes
        self.output_fmt = "NCHW"

    def forward_features(self, x_B3HW: Tensor) -> Tensor:
        """The final map, after its last ReLU, [B, D, H, W]."""
        raise NotImplementedError

    def forward_head(self, map_BDHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits [B, C] of a map of any size, or its mean [B, D] with `pre_logits`."""
        pooled_BD = map_BDHW.mean((2, 3))
        if pre_logits:
            return pooled_BD
        logits_BC: Tensor = self.get_classifier()(pooled_BD)
        return logits_BC

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """Logits [B, C] of normalized images."""
        return self.forward_head(self.forward_features(x_B3HW))

    def get_classifier(self) -> nn.Module:
        """The linear layer; an identity where it was taken off with `num_classes=0`."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer by a new, untrained one of `num_classes` outputs."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"global_pool={global_pool!r}: the CIFAR networks pool by mean only")
        self.num_classes = num_classes
        self.set_submodule(self.classifier_name, linear(self.num_features, num_classes))


def linear(num_features: int, num_classes: int) -> nn.Module:
    """The classifier, or an identity for zero classes (timm's way to ask for features)."""
    return nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()


def conv3x3(in_width: int, width: int, stride: int = 1) -> nn.Conv2d:
    """A padded 3x3 convolution without bias: a batch norm follows it everywhere."""
    return nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_width: int, width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A pointwise convolution without bias."""
    return nn.Conv2d(in_width, width, 1, stride=stride, groups=groups, bias=False)


def init_he(model: nn.Module, *, linear_std: float | None = None) -> None:
    """Fill convolutions from He's normal distribution over their outputs, biases with zero.

    Args:
        model: network to initialize in place; batch norms are left at torch's 1 and 0.
        linear_std: standard deviation of linear weights; None keeps torch's own.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and linear_std is not None:
            nn.init.normal_(module.weight, std=linear_std)
            nn.init.zeros_(module.bias)


def register_cifar(
    module: str,
    network: type[CifarNet],
    variants: Mapping[str, Mapping[str, Any]],
    *,
    map_side: int,
    first_conv: str = "conv1",
) -> None:
    """Register networks of one class with timm, each by its name and constructor arguments.

    Args:
        module: `__name__` of the module that defines the class; timm lists networks by module.
        network: class of the networks.
        variants: constructor arguments by the name that the network gets.
        map_side: side of the feature map of a 32 px image.
        first_conv: name of the first convolution, for timm's metadata.
    """
    cfg = {
        "input_size": (3, 32, 32),
        "num_classes": 100,
        "pool_size": (map_side, map_side),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "mean": CIFAR_MEAN,
        "std": CIFAR_STD,
        "first_conv": first_conv,
        "classifier": network.classifier_name,
    }
    # timm takes the metadata of a network from its module when the network is registered.
    cfgs = vars(sys.modules[module]).setdefault("default_cfgs", {})
    cfgs |= generate_default_cfgs({name: dict(cfg) for name in variants})
    for name, arguments in variants.items():
        register_model(_constructor(module, network, name, arguments))


def _constructor(
    module: str, network: type[CifarNet], name: str, arguments: Mapping[str, Any]
) -> Callable[..., CifarNet]:
    """The function that timm calls to make one network."""

    def construct(pretrained: bool = False, **options: Any) -> CifarNet:
        net: CifarNet = build_model_with_cfg(network, name, pretrained, **arguments, **options)
        return net

    construct.__name__ = construct.__qualname__ = name
    construct.__module__ = module
    return construct
