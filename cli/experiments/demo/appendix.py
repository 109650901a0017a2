"""The sections of the report on the cache, on running it again, and on how it was measured."""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path

from cache_service.human_format import human_bytes, human_seconds
from cli.experiments.demo.result import DemoResult

EACH_WAY = (
    "Each way was trained in a fresh process, one after the other, on the same views in the same "
    "order, from the same initial weights."
)
A_STEP = (
    "A step is everything from fetching a batch to the updated weights: rendering the views, "
    "reading and checking rows, the networks, the gradient. Scoring and saving lie outside."
)


def cache(result: DemoResult) -> str:
    """What was recorded, and how large it is."""
    held = result.recording
    scales = ", ".join(map(str, held.scales))
    if held.stored_scales != held.scales:
        (finest,) = held.stored_scales
        scales += f"; stored is the {finest} x {finest} grid, whose means are the coarser cells"
    rows = (
        ("Where", held.url),
        ("Views", f"{held.views:,}: seeds {held.seeds} of the training images"),
        ("Scales", scales),
        ("A view takes", f"{held.bytes_per_view:,} bytes: float16 logits, sample number, digests"),
        ("All files", human_bytes(held.stored_bytes)),
        ("Recorded in", human_seconds(held.seconds)),
        ("Fingerprint", held.fingerprint),
    )
    return "<dl>" + "".join(f"<dt>{a}</dt><dd>{escape(b)}</dd>" for a, b in rows) + "</dl>"


def again(result: DemoResult) -> str:
    """Commands and files."""
    out = Path(result.out)

    def path(name: str) -> str:
        return shlex.quote(str(out / name))

    commands = (
        (f"kd-cache build {path('build.yaml')}", "finds every view recorded: nothing left to do"),
        (
            f"kd-cache verify {path('cache')} --recompute 64",
            "reads every byte, asks the teacher again",
        ),
        (
            f"kd-cache train {path('kd.yaml')} --set out={path('kd-again')}",
            "the same run once more",
        ),
        (f"kd-cache evaluate {path('sd-kd')}", "scores a trained student"),
    )
    lines = "\n".join(f"{escape(command)}\n  # {note}" for command, note in commands)
    files = "\n".join(
        f"<details>\n<summary><code>{escape(str(out / name))}</code></summary>\n"
        f'<pre tabindex="0">{escape(content)}</pre>\n</details>'
        for name, content in result.files.items()
    )
    return (
        "<p>From the folder in which the demo was run:</p>\n"
        f'<pre tabindex="0">{lines}</pre>\n<p>The files it ran, as it wrote them:</p>\n{files}'
    )


def method(result: DemoResult) -> str:
    """How the numbers came about."""
    settings = result.settings
    threads = f"{settings.threads} thread{'s' if settings.threads > 1 else ''}"
    memory = (
        "what torch had allocated on the GPU"
        if result.device == "cuda"
        else "resident memory of the process above what it was before the run began, with all "
        "libraries loaded"
    )
    items = (
        f"Device: {result.device}, {threads}. Batches of {settings.batch_size}.",
        EACH_WAY,
        A_STEP,
        f"Peak memory is {memory}.",
        "The live teacher answers for whole images only: it does no work that KD does not need.",
        "Accuracy is that of the last epoch, on test images that no network was trained on.",
    )
    return "<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
