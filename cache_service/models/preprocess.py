"""uint8 views -> what a network is fed: resized if need be, scaled to 0..1, normalized.

Teachers and students share this, so a student that is given its teacher's settings sees its
teacher's input. Shape letters: B batch, H W pixels, h w pixels of the network's input.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from cache_service.format.spec import Preprocess


def prepare_views(
    views_BHW3: Tensor,
    preprocess: Preprocess,
    *,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Tensor:
    """Views as network input [B, 3, h, w] on `device`.

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
    images_B3HW = views_BHW3.to(device, non_blocking=True).permute(0, 3, 1, 2).float().div_(255)
    size = (preprocess.size, preprocess.size)
    if images_B3HW.shape[-2:] != size:
        images_B3HW = interpolate(
            images_B3HW, size, mode=preprocess.interpolation, antialias=True
        ).clamp_(0, 1)
    mean_311, std_311 = (
        torch.tensor(values, dtype=torch.float32, device=images_B3HW.device).reshape(3, 1, 1)
        for values in (preprocess.mean, preprocess.std)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images_B3HW.sub_(mean_311).div_(std_311).to(dtype).contiguous(memory_format=layout)
