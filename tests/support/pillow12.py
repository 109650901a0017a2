"""Records the golden cache of `tests/golden/pillow12`: run with Pillow 12 on the path.

pip install --no-deps --target /tmp/pillow12 pillow==12.0.0
PYTHONPATH=/tmp/pillow12:.:tests python -m support.pillow12
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import PIL

from support.builds import record_toy

GOLDEN = Path(__file__).parents[1] / "golden" / "pillow12"

NUM_SAMPLES, SIDE = 64, 72

CHANGES: dict[str, Any] = {
    "dataset": {
        "name": "support.toys:patches",
        "args": {"num_samples": NUM_SAMPLES, "side": SIDE},
    },
    "augment": {
        "size": 56,
        "ops": [{"op": "random_resized_crop"}],
    },
    "seeds": "0:1",
    "scales": [1],
    "layout": {"shard_rows": 64, "chunk_rows": 16},
}


def main() -> None:
    """Write the golden cache anew."""
    assert PIL.__version__.startswith("12."), PIL.__version__
    shutil.rmtree(GOLDEN, ignore_errors=True)
    record_toy(str(GOLDEN), **CHANGES)


if __name__ == "__main__":
    main()
