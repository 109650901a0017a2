"""What a run left behind, to compare with another run's."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import torch

from distill.checkpoint import load_checkpoint
from distill.reporting import Event, read_metrics


def curve(out: Any) -> list[dict[str, Any]]:
    """What a run reports, without its clocks and its restarts."""
    lines = [line for line in read_metrics(str(out)) if line["kind"] != "start"]
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def state_of(out: Any) -> dict[str, Any]:
    """Everything in a checkpoint that training changes."""
    saved = load_checkpoint(out)
    assert saved is not None
    return {key: saved[key] for key in ("model", "ema", "optimizer", "scaler", "history")}


def same(one: Any, other: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def stop_at(step: int | None) -> Callable[[Event], None]:
    """A listener that sends SIGTERM to this process as soon as that step is reported."""
    sent = []

    def listen(event: Event) -> None:
        # Once, though every student reports the step: a second one would end the process.
        if event.kind == "step" and event.step == step and not sent:
            sent.append(event)
            os.kill(os.getpid(), signal.SIGTERM)

    return listen
