"""From uint8 views to the input of a network: resized if need be, scaled to 0..1, normalized.

Teachers and students share this, so a student that is given its teacher's settings sees its
teacher's input. Shape letters: B batch, C channels, H W pixels, h w pixels of the network's input.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import interpolate

from cache_service.errors import ConfigError
from cache_service.format.spec import Preprocess
from cache_service.human_format import one_line
from cache_service.models.checkpoint_file import UNREADABLE, checkpoint_path, is_safetensors


def prepare_views(
    views_BHW3: Tensor,
    preprocess: Preprocess,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Views as network input [B, 3, h, w] on `device`; [B, 1, h, w] for grey input.

    Arithmetic is float32 throughout; `dtype` is applied last. Views cross to the device as uint8, a
    quarter of the bytes. Views of another size than `preprocess.size` are resized with
    antialiasing and cut to 0..1, because bicubic weights overshoot where a uint8 image cannot.

    Args:
        views_BHW3: uint8, any device. H and W may differ from each other and from the size.
        channels_last: memory format of the result.

    Raises:
        ValueError: `views_BHW3` is not uint8 [B, H, W, 3].
    """
    if views_BHW3.dtype != torch.uint8 or views_BHW3.ndim != 4 or views_BHW3.shape[-1] != 3:
        raise ValueError(
            f"views are {views_BHW3.dtype} {list(views_BHW3.shape)}, not uint8 [B, H, W, 3]"
        )
    pixels_BHW3 = views_BHW3.to(device, non_blocking=True)
    if preprocess.channels == 1:
        pixels_BHW3 = _grey(pixels_BHW3)
    images_BCHW = pixels_BHW3.permute(0, 3, 1, 2).float().div_(255)
    size = (preprocess.size, preprocess.size)
    if images_BCHW.shape[-2:] != size:
        images_BCHW = interpolate(
            images_BCHW, size, mode=preprocess.interpolation, antialias=True
        ).clamp_(0, 1)
    mean_C11 = _channels(preprocess.mean, images_BCHW.device)
    std_C11 = _channels(preprocess.std, images_BCHW.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images_BCHW.sub_(mean_C11).div_(std_C11).to(dtype).contiguous(memory_format=layout)


def _grey(views_BHW3: Tensor) -> Tensor:
    """Grey views [B, H, W, 1] as `convert("L")` of Pillow makes them (ITU-R 601-2 luma)."""
    red, green, blue = views_BHW3.to(torch.int32).unbind(dim=3)
    luma_BHW = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    return luma_BHW.to(torch.uint8)[..., None]


@lru_cache(maxsize=16)
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """One value per channel [C, 1, 1], copied to the device once and not at every batch."""
    with torch.inference_mode(mode=False):  # the tensor is used outside of inference, too
        return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1)


def recorded_preprocess(path: str | Path) -> Preprocess | None:
    """The preprocessing that a .safetensors file names for its network, as ours do; else None.

    Raises:
        ConfigError: the file cannot be read, or what it names is no preprocessing.
    """
    file = checkpoint_path(path)
    try:
        if not is_safetensors(file):
            return None
        with safe_open(file, framework="pt") as opened:
            text = (opened.metadata() or {}).get("preprocess")
        return None if text is None else Preprocess.model_validate_json(text)
    except (*UNREADABLE, ValidationError) as error:
        raise ConfigError(f"checkpoint {file} cannot be read: {one_line(error)}") from error
