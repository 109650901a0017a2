"""A frozen network that answers views.

Shape letters: B batch, R stored cells, C classes, D channels, H W pixels of a view.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cache_service.errors import UnsupportedError
from cache_service.format.codecs import Head
from cache_service.format.spec import TeacherId
from cache_service.models.preprocess import prepare_views

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Teacher:
    """A network in evaluation mode, its identity, and the cells that must be stored of it."""

    id: TeacherId
    stored_scales: tuple[int, ...]
    head: Head | None
    """The linear layer behind `features`, float32; None where features were not asked for."""
    device: torch.device
    channels_last: bool
    run_logits: Callable[[Tensor], Tensor] = field(repr=False)
    run_features: Callable[[Tensor], Tensor] = field(repr=False)
    weights_from: str = ""
    """Which weights were loaded, for people."""

    def answer(self, views_BHW3: Tensor) -> NDArray[np.float32]:
        """Raw logits [B, R, C] of uint8 views on the CPU. They may be non-finite."""
        return self._run(self.run_logits, views_BHW3)

    def features(self, views_BHW3: Tensor) -> NDArray[np.float32]:
        """Pooled input [B, R, D] of the linear head: logits = features @ weight.T + bias.

        Raises:
            UnsupportedError: the teacher was loaded without `want_features`.
        """
        if self.head is None:
            raise UnsupportedError(f"teacher {self.id.model} was loaded for logits, not features.")
        return self._run(self.run_features, views_BHW3)

    def _run(self, network: Callable[[Tensor], Tensor], views_BHW3: Tensor) -> NDArray[np.float32]:
        images_B3HW = prepare_views(
            views_BHW3, self.id.preprocess, device=self.device, channels_last=self.channels_last
        )
        with torch.inference_mode(), exact_kernels(), self._autocast():
            answers = network(images_B3HW)
        numbers: NDArray[np.float32] = answers.float().cpu().numpy()
        return numbers

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        dtype = AUTOCAST.get(self.id.precision)
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtype)


@contextlib.contextmanager
def exact_kernels() -> Iterator[None]:
    """Convolutions in what was asked for, and the same at every run.

    By default cuDNN computes float32 convolutions with 10-bit mantissas (TF32), which moves logits
    by more than float16 storage does, and may pick kernels by what else the GPU is doing.
    """
    with torch.backends.cudnn.flags(
        enabled=True,
        benchmark=False,
        deterministic=True,
        allow_tf32=False,
        fp32_precision="ieee",
    ):
        yield
