from __future__ import annotations

import numpy as np
import PIL.Image
import pytest
import torch
from torchvision.transforms import functional as vision

from cache_service.format.spec import Preprocess
from cache_service.models.preprocess import prepare_views

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def settings(size=32, **changes):
    return Preprocess(**({"size": size, "mean": MEAN, "std": STD} | changes))


def views(side=32, count=3):
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
    return torch.from_numpy(pixels)


def test_views_of_the_right_size_equal_totensor_and_normalize_to_the_bit():
    images = torch.stack([vision.to_tensor(view) for view in views().numpy()])
    expected = vision.normalize(images, list(MEAN), list(STD))
    assert torch.equal(prepare_views(views(), settings(), device="cpu"), expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 48])
def test_views_of_another_size_are_resized_as_pillow_does(interpolation, size):
    plain = settings(size, interpolation=interpolation, mean=(0, 0, 0), std=(1, 1, 1))
    muted = views() // 2 + 64  # Pillow cuts overshoot after each direction, so have none to cut
    ours = prepare_views(muted, plain, device="cpu").permute(0, 2, 3, 1) * 255
    method = getattr(PIL.Image.Resampling, interpolation.upper())
    for mine, view in zip(ours, muted.numpy(), strict=True):
        theirs = np.asarray(PIL.Image.fromarray(view).resize((size, size), method), np.float32)
        assert np.abs(mine.numpy() - theirs).max() < 1.1  # and it rounds twice


def test_bicubic_overshoot_is_cut():
    checks = (torch.arange(16) // 4 % 2 * 255).to(torch.uint8).expand(1, 16, 16)
    views_BHW3 = checks[..., None].expand(1, 16, 16, 3)
    plain = settings(32, interpolation="bicubic", mean=(0, 0, 0), std=(1, 1, 1))
    resized = prepare_views(views_BHW3, plain, device="cpu")
    assert (resized.min(), resized.max()) == (0, 1)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_and_type_are_as_asked_and_the_numbers_the_same(channels_last, dtype):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    asked = {"device": "cpu", "dtype": dtype, "channels_last": channels_last}
    images = prepare_views(views(), settings(), **asked)
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=layout)
    assert torch.equal(images, prepare_views(views(), settings(), device="cpu").to(dtype))


def test_the_views_are_left_as_they_were():
    before = views()
    after = before.clone()
    prepare_views(after, settings(48), device="cpu")
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    "wrong",
    [views().float(), views().permute(0, 3, 1, 2), views()[0]],
    ids=["float", "channels first", "one view"],
)
def test_anything_but_uint8_views_is_refused(wrong):
    with pytest.raises(ValueError, match=r"not uint8 \[B, H, W, 3\]"):
        prepare_views(wrong, settings(), device="cpu")
