"""The 32 x 32 networks that distillation papers compare on, registered with timm on import."""

from __future__ import annotations

from cache_service.models.zoo import mobile, resnet, vgg

CIFAR_NAMES: tuple[str, ...] = tuple(
    name for module in (resnet, vgg, mobile) for name in vars(module)["default_cfgs"]
)
"""Names that timm knows once this is imported; `cifar_` is in front of names that timm has too."""
