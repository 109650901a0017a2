"""Where a table was measured: the machine and the versions of what computed it."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from distill.students import choose_device

PACKAGES = ("kd-cache", "torch", "torchvision", "timm", "numpy", "zarr", "pillow")


def describe_machine(device: str = "auto") -> dict[str, Any]:
    """Processor, cores, threads, and the device that `device` of a train file means here."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": "cpu",
    }
    chosen = choose_device(device)
    if chosen.type == "cuda":
        found["device"] = torch.cuda.get_device_name(chosen)
    return found


def describe_versions() -> dict[str, str]:
    """Python and the packages that figures may depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # not Linux
        return platform.processor()
    names = [line.partition(":")[2] for line in text.splitlines() if line.startswith("model name")]
    return names[0].strip() if names else platform.processor()
