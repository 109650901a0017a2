"""Random numbers of a run: a pure function of its seed and the step, and nobody else's business.

Dropout and the like draw from torch's generators. Each step starts them anew from (seed, step), so
a resumed run draws what an unbroken one would, whatever loaders and evaluations drew in between,
and no generator has to be saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import torch


@contextmanager
def private_random(device: torch.device) -> Iterator[None]:
    """Give the caller's generators back as they were, on the CPU and on `device`."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        yield


def seed_step(seed: int, step: int, device: torch.device) -> None:
    """Start torch's generators, on the CPU and on `device`, for one step."""
    # A digest, because torch's CPU generator looks at the low 32 bits of a seed only.
    digest = blake2b(f"{seed},{step}".encode(), digest_size=4).digest()
    mixed = int.from_bytes(digest, "little")
    torch.default_generator.manual_seed(mixed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(mixed)
