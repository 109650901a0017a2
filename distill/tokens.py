"""Vision transformers with one distillation token per teacher, or one token for all teachers.

Name one in a train file as `student: {model: distill.tokens:vit_tokens, model_args: {backbone:
vit_tiny_patch16_224, num_tokens: 2, img_size: 32, patch_size: 4}}`; the other arguments are the
backbone's. Shape letters: B batch, L tokens, D channels, C classes, N distillation tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.patch_dropout import PatchDropout
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cache_service.errors import ConfigError
from cache_service.models.answers import describe
from cache_service.models.create import create_model
from distill.methods.multi_teacher import HeadLogits

INIT_STD = 0.02
"""Standard deviation of new tokens, positions and heads, as in DeiT. It must not be 0, because
tokens that start equal stay equal."""


class TokenViT(nn.Module):
    """A vision transformer whose class token learns from labels and whose others from teachers.

    Each token has its own head. `forward` returns the mean of all heads' logits [B, C], in
    training too, so that any method can train it; `forward_heads` returns them separately.

    Source: Touvron et al., "Training data-efficient image transformers", ICML 2021: one token, and
    the mean of two heads' logits at inference, as in their code (the paper adds probabilities).
    Departure: several tokens, with equal weights in the mean.

    Args:
        backbone: any VisionTransformer of timm; changed in place. Its own tokens and their weights
            stay, and the new tokens are placed after them.
        num_tokens: N >= 1.

    Raises:
        ConfigError: the network has no class token, or a distillation token already.
    """

    def __init__(self, backbone: nn.Module, num_tokens: int) -> None:
        super().__init__()
        vit = _require_vit(backbone)
        self.first_token = vit.num_prefix_tokens
        self.num_teacher_heads = num_tokens
        self.num_classes = vit.num_classes
        self.pretrained_cfg = getattr(vit, "pretrained_cfg", None)
        insert_tokens(vit, num_tokens)
        self.backbone = vit
        heads = [nn.Linear(vit.embed_dim, vit.num_classes) for _ in range(num_tokens)]
        for head in heads:
            nn.init.trunc_normal_(head.weight, std=INIT_STD)
            nn.init.zeros_(head.bias)
        self.heads = nn.ModuleList(heads)

    def forward_heads(self, images_B3HW: Tensor) -> HeadLogits:
        """Return the logits of the class token and of each distillation token."""
        features_BLD: Tensor = self.backbone.forward_features(images_B3HW)
        label_BC: Tensor = self.backbone.forward_head(features_BLD)
        tokens_BND = features_BLD.narrow(1, self.first_token, self.num_teacher_heads)
        # Some networks apply the norm after pooling; the classifier of the class token uses it too.
        tokens_BND = self.backbone.head_drop(self.backbone.fc_norm(tokens_BND))
        teachers = (
            head(token_BD)
            for head, token_BD in zip(self.heads, tokens_BND.unbind(dim=1), strict=True)
        )
        return HeadLogits(label_BC, tuple(teachers))

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Return the mean of all heads' logits, [B, C]."""
        label_BC, teachers = self.forward_heads(images_B3HW)
        return torch.stack([label_BC, *teachers]).mean(dim=0)


def vit_tokens(
    *,
    backbone: str,
    num_tokens: int,
    num_classes: int | None = None,
    pretrained: bool = False,
    **model_args: Any,
) -> TokenViT:
    """Create a timm vision transformer with `num_tokens` distillation tokens.

    Args:
        backbone: name of the network in timm.
        num_tokens: number of teachers, or 1 for a token that all teachers share.
        num_classes: number of classes; None means that of the backbone.
        pretrained: load the backbone's pretrained weights; tokens and their heads are new.
        model_args: passed on to the backbone, such as `img_size` and `patch_size`.

    Raises:
        ConfigError: the backbone is unknown, or it cannot take distillation tokens.
    """
    if type(num_tokens) is not int or num_tokens < 1:
        raise ConfigError(
            f"num_tokens={num_tokens!r} is not a number of distillation tokens, 1 or more."
        )
    model = create_model(backbone, num_classes=num_classes, pretrained=pretrained, **model_args)
    return TokenViT(model, num_tokens)


def _require_vit(model: nn.Module) -> VisionTransformer:
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"{describe(model)} is a {type(model).__name__}, and only timm's VisionTransformer can "
            "take distillation tokens.",
            hint="Choose a vit_* or deit_* network.",
        )
    if isinstance(model, VisionTransformerDistilled):
        raise ConfigError(
            f"{describe(model)} has a distillation token already.",
            hint=f"Choose {describe(model).replace('_distilled', '')}.",
        )
    if not model.has_class_token:
        raise ConfigError(
            f"{describe(model)} has no class token, which learns from labels.",
            hint="Choose a network that has one, such as vit_tiny_patch16_224.",
        )
    return model


@torch.no_grad()
def insert_tokens(vit: VisionTransformer, num_tokens: int) -> None:
    """Append learned tokens and their positional embeddings to the tokens of the network.

    They are added as timm's register tokens. The heads of timm do not read register tokens, so the
    network needs no other change.
    """
    class_token_1LD = vit.cls_token
    assert class_token_1LD is not None
    first = vit.num_prefix_tokens

    def initialized() -> Tensor:
        new_1ND = class_token_1LD.new_empty(1, num_tokens, vit.embed_dim)
        return nn.init.trunc_normal_(new_1ND, std=INIT_STD)

    registers = [] if vit.reg_token is None else [vit.reg_token]
    vit.reg_token = nn.Parameter(torch.cat([*registers, initialized()], dim=1))
    if vit.pos_embed is not None and not vit.no_embed_class:
        before_1LD, after_1LD = vit.pos_embed[:, :first], vit.pos_embed[:, first:]
        vit.pos_embed = nn.Parameter(torch.cat([before_1LD, initialized(), after_1LD], dim=1))
    vit.num_reg_tokens += num_tokens
    vit.num_prefix_tokens += num_tokens
    if isinstance(vit.patch_drop, PatchDropout):
        vit.patch_drop.num_prefix_tokens = vit.num_prefix_tokens
