"""Versions of the libraries that can change a pixel: stored in a cache, compared on replay."""

from __future__ import annotations

import numpy as np
import PIL
import torch
from PIL import features
from torchvision.version import __version__ as torchvision_version


def library_versions() -> dict[str, str]:
    """Library to version; codec libraries that this Pillow was built without are left out.

    A build's suffix (`+cpu`, `+cu130`) is dropped, because no pixel depends on it.
    """
    versions = {
        "numpy": np.__version__,
        "pillow": PIL.__version__,
        "torch": str(torch.__version__),
        "torchvision": torchvision_version,
    }
    decoders = {
        "libjpeg": features.version_codec("jpg"),
        "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
        "libwebp": features.version_module("webp"),
        "zlib": features.version_codec("zlib"),
    }
    versions |= {name: version for name, version in decoders.items() if version is not None}
    return {name: version.partition("+")[0] for name, version in sorted(versions.items())}
