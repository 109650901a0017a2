"""`kd-cache reproduce sdd-cifar100 --pair resnet32x4:resnet8x4` with fewer epochs and one seed.

This is for a machine that is available for minutes only. It differs from the shipped experiment in
the length of the runs, in the batch size and its learning rate, in bfloat16 and in compiled
networks. The order of the methods can therefore be compared with the published table, but the
figures cannot.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from cli.experiments.reproduce.cifar100 import decode
from cli.experiments.reproduce.sdd_cifar100 import make_sdd_cifar100
from cli.experiments.reproduce.shipped import Options
from cli.experiments.runner import write_results

PAIR = "resnet32x4:resnet8x4"
BATCH_SIZE = 500
SIZES = {"epochs": 30, "seeds": 10, "batch-size": BATCH_SIZE}
"""Of each network, of the recording, and of a step, unless the command line says otherwise."""

PUBLISHED_EPOCHS = 240


def main() -> None:
    """Train the teacher, record it, train the students, write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    for name in ("out", "data", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--device", default="cuda")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    root = str(Path(given.work, "cifar100"))
    decode(given.data, root)
    options = Options(
        name="sdd-cifar100",
        out=given.work,
        data=given.data,
        runs=1,
        quick=False,
        on_message=_say,
        pairs=(PAIR,),
        device=given.device,
        changes=_changes(given.epochs, given.seeds, given.batch_size, on_gpu=given.device != "cpu"),
    )
    table, curves = make_sdd_cifar100(options, root)
    sizes = [f"--{name} {getattr(given, name.replace('-', '_'))}" for name in SIZES]
    made_by = f"python benchmarks/short_sdd.py {' '.join(sizes)}"
    table = table.model_copy(update={"command": made_by})
    written = write_results(table, curves, out=given.out, name="sdd-cifar100-short")
    _say(written.page)


def _changes(epochs: int, seeds: int, batch_size: int, *, on_gpu: bool) -> dict[str, Any]:
    milestones = sorted({max(epochs * at // PUBLISHED_EPOCHS, 1) for at in (150, 180, 210)})
    warm_up = epochs / 12  # as 20 of 240
    return {
        "title": f"Scale decoupled distillation on CIFAR-100, shortened to {epochs} epochs",
        "evaluate": {"every": max(epochs // 3, 1)},
        "train": {
            "epochs": epochs,
            "schedule": {"milestones": milestones, "warmup_epochs": min(1.0, epochs / 2)},
            "batch_size": batch_size,
            # 0.05 for batches of 64; 0.4 for 500 is unstable in so few epochs
            "optimizer": {"lr": 0.2 * batch_size / BATCH_SIZE},
            "amp": "bfloat16" if on_gpu else "none",
            "channels_last": on_gpu,
            "compile": on_gpu,
            "workers": 0,  # the views are made on the device
            "log_every": 100,
            "checkpoint_every": {"epochs": epochs},
        },
        "recordings": {
            "cells": {"seeds": f"0:{seeds}", "batch_size": 1000, "workers": 12 if on_gpu else 0}
        },
        "methods": {
            name: {"warmup_epochs": warm_up} for name in ("dkd", "nkd", "sd-dkd", "sd-nkd")
        },
    }


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
