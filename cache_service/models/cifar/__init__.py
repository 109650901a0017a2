"""The 32 x 32 networks that distillation papers compare on, registered with timm on import."""

from __future__ import annotations

from cache_service.models.cifar import (
    mobilenetv2,
    resnet,
    resnet50,
    shufflenetv1,
    shufflenetv2,
    vgg,
    wrn,
)

CIFAR_NAMES: tuple[str, ...] = tuple(
    name
    for module in (resnet, resnet50, wrn, vgg, mobilenetv2, shufflenetv1, shufflenetv2)
    for name in module.default_cfgs
)
"""Names that timm knows once this is imported; `cifar_` stands where timm has a like name."""
