"""What the teacher costs a student, live and recorded: views per second and peak memory.

For each pair of networks the same student takes the same steps on the same views four ways (alone,
with the live teacher, from the cache with KD and with SD-KD), each in a process of its own, and a
table goes to --out as Markdown and JSON, with the machine and the versions. Images are random:
speed and memory do not depend on what is on them.

    python benchmarks/gpu.py --out docs/results/gpu --device cuda
    python benchmarks/gpu.py --out /tmp/gpu --device cpu --pairs tiny     # tries the harness
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare, run_local
from cache_service.views.identity import library_versions
from cli.experiments.demo.measure import Measured, VariantJob
from distill.config import TrainConfig


class Pair(NamedTuple):
    """A teacher, a student, and what they look at."""

    teacher: str
    student: str
    size: int
    num_classes: int
    num_samples: int
    batch_size: int


PAIRS = {
    "tiny": (Pair("resnet8x4", "resnet8x4", 16, 10, 128, 32),),
    "cifar": (
        Pair("resnet32x4", "resnet8x4", 32, 100, 6400, 64),
        Pair("resnet32x4", "cifar_shufflenetv2", 32, 100, 6400, 64),
    ),
    "imagenet": (
        Pair("resnet34", "resnet18", 224, 1000, 5120, 256),
        Pair("vit_large_patch16_224", "resnet18", 224, 1000, 5120, 256),
    ),
}

VARIANTS = {
    "alone": ("ce", False, False),
    "live teacher, KD": ("kd", True, False),
    "cache, KD": ("kd", False, True),
    "cache, SD-KD": ("sd-kd", False, True),
}


class Noise:
    """Random images, the same for every process: item i is a function of i."""

    def __init__(self, num_samples: int, size: int, num_classes: int) -> None:
        self.targets = [sample % num_classes for sample in range(num_samples)]
        self.classes = [f"class{label}" for label in range(num_classes)]
        self._size = size

    def __len__(self) -> int:
        """Number of images."""
        return len(self.targets)

    def __getitem__(self, sample: int) -> tuple[Image.Image, int]:
        """Image and label."""
        rng = np.random.default_rng(sample)
        pixels = rng.integers(0, 256, (self._size, self._size, 3), dtype=np.uint8)
        return Image.fromarray(pixels), self.targets[sample]


def noise(**arguments: int) -> Noise:
    """Factory for `dataset: {name: benchmarks/gpu.py:noise}`."""
    return Noise(**arguments)


def main() -> None:
    """Measure every pair and write the table."""
    options = _options()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for name in options.pairs:
        for pair in PAIRS[name]:
            rows += _measure_pair(pair, out, options)
    document = {"machine": _machine(options.device), "versions": library_versions(), "rows": rows}
    (out / "gpu.json").write_text(json.dumps(document, indent=2) + "\n")
    (out / "gpu.md").write_text(_table(document))
    sys.stdout.write(_table(document))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--out", required=True, help="folder of the tables and of the caches")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--amp", default="none", choices=["none", "bfloat16", "float16"])
    parser.add_argument("--pairs", nargs="+", choices=list(PAIRS), default=["cifar", "imagenet"])
    return parser.parse_args()


def _measure_pair(pair: Pair, out: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    folder = out / f"{pair.teacher}-{pair.student}-{pair.size}"
    build = _build_file(pair, folder, options)
    opened = open_build(build)
    prepare(opened)
    run_local(opened, seeds=(0,))
    found = []
    for variant, (method, is_live, is_cached) in VARIANTS.items():
        if method == "sd-kd" and build.scales == (1,):
            continue
        source = (
            {"caches": build.cache}
            if is_cached
            else {"augment": build.augment.model_dump(exclude_none=True), "seeds": 0}
        )
        named = {
            "method": {"name": method},
            "out": str(folder / method / ("live" if is_live else "plain")),
        }
        train = TrainConfig.model_validate(_train_file(pair, build, options) | source | named)
        job = VariantJob(
            train=train,
            teacher=build.teacher if is_live else None,
            threads=torch.get_num_threads(),
        )
        measured = _run(job)
        found.append(
            {
                "teacher": pair.teacher,
                "student": pair.student,
                "size": pair.size,
                "variant": variant,
                "views_per_s": round(pair.batch_size / measured.seconds_per_step, 1),
                "peak_memory_bytes": measured.peak_memory_bytes,
            }
        )
    return found


def _build_file(pair: Pair, folder: Path, options: argparse.Namespace) -> BuildConfig:
    # A network whose head reads a class token has no cells: its students learn from whole images.
    scales = [1] if pair.teacher.startswith("vit") else [1, 2]
    sizes = {"num_samples": pair.num_samples, "size": pair.size, "num_classes": pair.num_classes}
    return BuildConfig.model_validate(
        {
            "cache": str(folder / "cache"),
            "dataset": {"name": f"{Path(__file__).resolve()}:noise", "args": sizes},
            "augment": {"preset": "cifar" if pair.size <= 32 else "imagenet", "size": pair.size},
            "teacher": {
                "model": pair.teacher,
                "num_classes": pair.num_classes,
                "allow_untrained": True,
                "input_size": pair.size,
            },
            "scales": scales,
            "seeds": "0:1",
            "batch_size": pair.batch_size,
            "workers": options.workers,
            "device": options.device,
        }
    )


def _train_file(pair: Pair, build: BuildConfig, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "dataset": build.dataset,
        "student": {"model": pair.student, "input_size": pair.size},
        "optimizer": {"name": "sgd", "lr": 0.01},
        "epochs": 1,
        "batch_size": pair.batch_size,
        "workers": options.workers,
        "amp": options.amp,
        "device": options.device,
        "log_every": 1,
    }


def _run(job: VariantJob) -> Measured:
    done = subprocess.run(
        [sys.executable, "-m", "cli.experiments.demo.measure"],
        input=job.model_dump_json() + "\n",  # a message of `cache_service.processes` is a line
        capture_output=True,
        text=True,
        check=False,
    )
    for line in done.stdout.splitlines():
        message = json.loads(line)
        if "measured" in message:
            return Measured.model_validate(message["measured"])
    raise SystemExit(f"a run ended with {done.returncode}: {done.stdout}{done.stderr[-2000:]}")


def _machine(device: str) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine()
    return {"device": name, "python": platform.python_version(), "system": platform.system()}


def _table(document: dict[str, Any]) -> str:
    lines = [
        f"# Cost of a teacher on {document['machine']['device']}",
        "",
        f"torch {document['versions']['torch']}, Python {document['machine']['python']}.",
        "",
        f"Command: `{' '.join(['python', *sys.argv])}`.",
        "",
        "| teacher -> student | px | variant | views/s | of alone | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    alone = 1.0
    for row in document["rows"]:
        if row["variant"] == "alone":
            alone = row["views_per_s"]
        fraction = row["views_per_s"] / alone
        lines.append(
            f"| {row['teacher']} -> {row['student']} | {row['size']} | {row['variant']} | "
            f"{row['views_per_s']:,.0f} | {fraction:.0%} | "
            f"{row['peak_memory_bytes'] / 1e6:,.0f} MB |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
