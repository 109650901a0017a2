"""Runs the same build and train files in two checkouts and compares what comes out.

    .venv/bin/python benchmarks/compare_trees.py OLD NEW [--keep DIR]

OLD and NEW are roots of checkouts of this project. Each records the same caches (every codec, SDD
scales, mixing, every op) and trains every method from them, on the digits that scikit-learn ships.
Recordings must agree in every byte, and training runs in every logged loss. Exits with 1 where one
differs. A redesign runs it after each step; it takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CROP = {"op": "pad_crop", "padding": 2}
EVERY_OP: list[dict[str, Any]] = [
    {"op": "random_resized_crop", "area": [0.4, 1.0]},
    {"op": "horizontal_flip"},
    {"op": "random_affine", "degrees": 10, "translate": 0.1, "scale": [0.9, 1.1]},
    {"op": "color_jitter", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3},
    {"op": "rand_augment"},
    {"op": "random_erasing"},
    {"op": "mixup", "alpha": 0.4, "prob": 0.5},
    {"op": "cutmix", "alpha": 1.0, "prob": 0.5},
]
TEACHER = {"model": "resnet8x4", "allow_untrained": True}


def _build(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "cache": f"caches/{name}",
        "dataset": {"name": "digits"},
        "augment": {"size": 16, "ops": [CROP]},
        "seeds": "0:2",
        "teacher": TEACHER | {"seed": 1},
        "scales": [1],
        "workers": 0,
        "device": "cpu",
    } | changes


BUILDS = {
    "dense": _build("dense", scales=[1, 2, 4]),
    "second": _build("second", teacher=TEACHER | {"seed": 2}),
    "mixed": _build("mixed", augment={"size": 16, "ops": EVERY_OP}, scales=[1, 2]),
    "trivial": _build("trivial", augment={"size": 16, "ops": [CROP, {"op": "trivial_augment"}]}),
    "int8": _build("int8", codec={"kind": "int8"}, scales=[1, 2]),
    "topk": _build("topk", codec={"kind": "topk", "k": 4}, scales=[1, 2]),
    "features": _build("features", codec={"kind": "features"}, scales=[1, 2]),
}


def _train(
    method: dict[str, Any], caches: str | list[str] = "dense", **more: Any
) -> dict[str, Any]:
    names = [caches] if isinstance(caches, str) else caches
    return {
        "dataset": {"name": "digits"},
        "caches": [f"caches/{name}" for name in names],
        "student": {"model": "resnet20"},
        "method": method,
        "optimizer": {"name": "sgd", "lr": 0.02, "nesterov": True},
        "epochs": 1,
        "batch_size": 256,
        "workers": 0,
        "device": "cpu",
        "log_every": 1,
    } | more


TWO = ["second", "dense"]
TRAINS = {
    "ce": _train({"name": "ce"}),
    "kd": _train({"name": "kd"}, evaluate={"dataset": {"name": "digits", "split": "test"}}),
    "kd-mixed": _train({"name": "kd"}, "mixed", label_smoothing=0.1, ema=0.9, epochs=2),
    "kd-topk": _train({"name": "kd"}, "topk"),
    "kd-standardized": _train({"name": "kd", "standardize": True}, "int8"),
    "dkd": _train({"name": "dkd"}),
    "nkd": _train({"name": "nkd"}),
    "sd-kd": _train({"name": "sd-kd"}),
    "sd-kd-mixed": _train({"name": "sd-kd"}, "mixed"),
    "sd-kd-int8": _train({"name": "sd-kd"}, "int8"),
    "sd-dkd": _train({"name": "sd-dkd"}, "features"),
    "sd-nkd": _train({"name": "sd-nkd"}),
    "logits": _train({"name": "logits"}),
    "soft": _train({"name": "soft"}, TWO),
    "hard": _train({"name": "hard"}, TWO),
    "ensemble": _train({"name": "ensemble"}, TWO),
    "dist": _train({"name": "dist"}),
    "tf-kd": _train({"name": "tf-kd"}),
    "ddgsd": _train({"name": "ddgsd"}, epochs=2),
    "ps-kd": _train({"name": "ps-kd"}, epochs=2),
    "cs-kd": _train({"name": "cs-kd"}),
    "specialist": _train({"name": "specialist", "classes": [3, 8, 9]}),
    "peers": _train(
        {"name": "peers"},
        students=[
            {"name": "a", "seed": 1},
            {"name": "b", "seed": 2},
            {"name": "c", "method": {"name": "kd"}},
        ],
    ),
}

RUNNER = """
import json, sys
from cli.main import run
for arguments in json.load(open(sys.argv[1])):
    sys.argv = ["kd-cache", *arguments]
    try:
        run()
    except SystemExit as end:
        if end.code:
            print("exit", end.code, "of", *arguments, flush=True)
"""


def run_tree(root: Path, work: Path) -> None:
    """Records and trains everything with the checkout at `root`, in the folder `work`."""
    work.mkdir(parents=True)
    commands = []
    for name, document in BUILDS.items():
        (work / f"{name}.build.yaml").write_text(json.dumps(document))
        commands.append(["build", f"{name}.build.yaml"])
    for name, document in TRAINS.items():
        (work / f"{name}.train.yaml").write_text(json.dumps(document | {"out": f"runs/{name}"}))
        commands.append(["train", f"{name}.train.yaml"])
    (work / "commands.json").write_text(json.dumps(commands))
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with (work / "output.txt").open("w") as output:
        subprocess.run(
            [sys.executable, "-c", RUNNER, "commands.json"],
            cwd=work, env=environment, check=True, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def cache_files(work: Path) -> dict[str, bytes]:
    """Every file below `caches`, by its relative path."""
    folder = work / "caches"
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def losses(work: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics of each run without the figures that depend on the clock or on memory."""
    found = {}
    for file in sorted((work / "runs").rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.parent.relative_to(work))] = [
            {key: value for key, value in _flat(line) if not _depends_on_the_machine(key)}
            for line in lines
            if line.get("kind") in {"step", "evaluation", "epoch"}
        ]
    return found


def _flat(document: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in document.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value))
    return pairs


def _depends_on_the_machine(key: str) -> bool:
    return any(word in key for word in ("second", "_s", "per_s", "time", "memory", "bytes"))


def compare(old: Path, new: Path) -> list[str]:
    """One line for each difference between the results of two trees."""
    before, after = cache_files(old), cache_files(new)
    lines = [
        f"recording differs: {name}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    first, second = losses(old), losses(new)
    lines += [
        f"training differs: {run}: {_first_difference(first.get(run), second.get(run))}"
        for run in sorted(first.keys() | second.keys())
        if first.get(run) != second.get(run)
    ]
    missing = set(TRAINS) - {run.split("/")[1] for run in first}
    lines += [f"the old tree did not train: {name}" for name in sorted(missing)]
    missing = set(BUILDS) - {name.split("/")[0] for name in before}
    return lines + [f"the old tree did not record: {name}" for name in sorted(missing)]


def _first_difference(old: list[Any] | None, new: list[Any] | None) -> str:
    if old is None or new is None:
        return "one of the trees has no such run"
    for index, (a, b) in enumerate(zip(old, new, strict=False)):
        if a != b:
            keys = sorted(k for k in a.keys() | b.keys() if a.get(k) != b.get(k))
            return f"line {index}, " + ", ".join(
                f"{k}: {a.get(k)} and {b.get(k)}" for k in keys[:4]
            )
    return f"{len(old)} and {len(new)} lines"


def main() -> int:
    """Compares two checkouts; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--keep", type=Path, help="Keep what the old tree made, and reuse it.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        old = options.keep or Path(folder, "old")
        new = Path(folder, "new")
        if not old.exists():
            run_tree(options.old.resolve(), old)
        run_tree(options.new.resolve(), new)
        lines = compare(old, new)
        if lines:
            lines.append((new / "output.txt").read_text()[-3000:])
        runs, files = losses(new), cache_files(new)
    print("\n".join(lines) or f"identical: {len(files)} files of caches, {len(runs)} runs")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
