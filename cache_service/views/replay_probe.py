"""Whether a user's pipeline gives the same views again: tried on a few before a recording.

`require_replayable` renders the same views twice in this process and once in a new one, each time
in another order. A pipeline with random generators of its own, a counter or a buffer differs in
this process; one that depends on `hash`, on the process or on a random choice at import differs in
the new one. Run as a program, this module is the new process.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cache_service.errors import KdCacheError, UnsupportedError, error_from_document
from cache_service.processes import START_S, ChildProcess, ParentConnection, module_command
from cache_service.views.order import epoch_order
from cache_service.views.pipeline import SeededPipeline, is_albumentations
from cache_service.views.pipeline_state import (
    GENERATORS,
    describe_changes,
    generator_states,
    held_iterators,
    kept_state,
    reachable,
)

if TYPE_CHECKING:  # importing it takes a second, which the new process saves
    from cache_service.views.replay import Views

NUM_PROBES = 16
"""Views that are rendered three times. A difference in every tenth view shows in 80 % of builds."""

MAX_PROBE_BYTES = 64 << 20
"""Bytes of decoded images that are sent to the new process; large images mean fewer probes."""

COMMAND = module_command("cache_service.views.replay_probe")


def require_replayable(views: Views, seed: int) -> None:
    """Refuse a user's pipeline whose views are not the same when they are rendered again.

    Takes the time of about 50 views and of starting a Python process that imports torch and the
    pipeline: a few seconds.
    Recipes of declared ops are not tried: their draws are a function of seed and sample.

    Raises:
        UnsupportedError: a view differs. The message names what the pipeline keeps.
        ConfigError: the pipeline raised an error, here or in the new process.
    """
    path = views.recipe.callable
    if path is None:
        return
    renderer = SeededPipeline(path, views.recipe.size)
    samples = epoch_order(len(views.dataset), seed)[:NUM_PROBES]
    images = list(_up_to(MAX_PROBE_BYTES, (views.dataset.image(int(n)) for n in samples)))
    params_B1 = renderer.draw(seed, samples[: len(images)])
    before = kept_state(renderer.pipeline)
    first = _Pass(renderer, images, params_B1, range(len(images)))
    again = _Pass(renderer, images, params_B1, reversed(range(len(images))))
    differing = [n for n in first.digests if first.digests[n] != again.digests[n]]
    carried = [n for n in first.states if first.states[n] != again.states[n]]
    if differing or carried:
        after = kept_state(renderer.pipeline)
        raise UnsupportedError(
            f"augment.callable {path!r} cannot be replayed: rendered again in another order, "
            f"{_counted(differing, images)}. {_kept(renderer.pipeline, before, after)}.",
            hint=_advice(renderer.pipeline, after),
        )
    elsewhere = _render_elsewhere(path, views.recipe.size, images, params_B1)
    differing = [n for n in first.digests if first.digests[n] != elsewhere[n]]
    if differing:
        raise UnsupportedError(
            f"augment.callable {path!r} cannot be replayed: rendered in a new process, "
            f"{_counted(differing, images)}. It depends on something that differs between "
            "processes, such as a random choice at import or in the factory, hash() of a text, "
            "the order of a set, the time, or a process id.",
            hint="Make that choice from a fixed seed, or in each call, from the global generators "
            "of random, numpy or torch, which are seeded for each view.",
        )


class _Pass:
    """One rendering of every probe.

    Attributes:
        digests: of the pixels, by number of the probe.
        states: of the pipeline's own random generators after that probe.
    """

    def __init__(
        self,
        renderer: SeededPipeline,
        images: Sequence[Image.Image],
        params_B1: NDArray[np.int64],
        order: Iterable[int],
    ) -> None:
        self.digests: dict[int, str] = {}
        self.states: dict[int, dict[str, str]] = {}
        for number in order:
            # A copy, because a pipeline may paint on the image that it is given.
            pixels = renderer.pixels(images[number].copy(), params_B1[number].tolist())
            self.digests[number] = blake2b(pixels.tobytes(), digest_size=16).hexdigest()
            self.states[number] = generator_states(renderer.pipeline)


def _up_to(num_bytes: int, images: Iterable[Image.Image]) -> Iterable[Image.Image]:
    """At least two images, then as many as fit."""
    left = num_bytes
    for number, image in enumerate(images):
        left -= 3 * image.width * image.height
        if number >= 2 and left < 0:
            return
        yield image


def _counted(differing: Sequence[int], images: Sequence[Image.Image]) -> str:
    if not differing:
        return f"the same {len(images)} views left its random generators in other states"
    return f"{len(differing)} of the same {len(images)} views had other pixels"


def _kept(
    pipeline: object, before: dict[str, tuple[object, str]], after: dict[str, tuple[object, str]]
) -> str:
    kept = describe_changes(before, after) or held_iterators(pipeline)[:3]
    if kept:
        return f"It keeps state between calls: {', '.join(kept)}"
    return "Nothing that it keeps was found to change, so it may use the time, a file or os.urandom"


def _advice(pipeline: object, state: dict[str, tuple[object, str]]) -> str:
    inside = (each for _, each in reachable(pipeline))
    if not is_albumentations(pipeline) and any(is_albumentations(each) for each in inside):
        return (
            "Return the Albumentations Compose itself from the factory: it is then called with "
            "image=..., and its generators are seeded for each view."
        )
    own = any(isinstance(each, GENERATORS) for each, _ in state.values())
    return (
        "Draw from the global generators of random, numpy or torch, which are seeded for each view"
        + (
            ", or give the pipeline a method set_random_seed(seed), which is called before each."
            if own
            else ", and keep nothing from one call to the next."
        )
    )


def _render_elsewhere(
    path: str, size: int, images: Sequence[Image.Image], params_B1: NDArray[np.int64]
) -> list[str]:
    """Digests of the probes from a new process, which renders them in a third order."""
    # Another seed of hash() than this process has, whatever the environment sets.
    environment = {"PYTHONHASHSEED": str(1 + hash("kd-cache") % 4_000_000_000)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "probes.npz"
        arrays = {str(n): np.asarray(image) for n, image in enumerate(images)}
        np.savez(file, allow_pickle=False, params=params_B1, **arrays)
        job = {"callable": path, "size": size, "file": str(file)}
        child = ChildProcess(COMMAND, first_message=job, environment=environment)
        try:
            answer = child.receive(START_S)
        except TimeoutError:
            answer = None
        finally:
            status = child.stop(0) if answer is None else child.wait(START_S)
    if answer is None:
        raise UnsupportedError(
            f"augment.callable {path!r} ended a new process, or hung in it (status {status}); what "
            "it printed says why.",
            hint="Its module must be importable there: loader workers are such processes, too.",
        )
    if "error" in answer:
        raise error_from_document(answer["error"])
    return list(answer["digests"])


def main() -> int:
    """Render the probes of the parent process and return the exit status."""
    parent = ParentConnection()
    job = parent.receive()
    assert job is not None
    try:
        renderer = SeededPipeline(job["callable"], job["size"])
        with np.load(job["file"]) as arrays:
            params_B1 = arrays["params"]
            images = [Image.fromarray(arrays[str(n)]) for n in range(len(params_B1))]
        middle = len(images) // 2
        order = [*range(middle, len(images)), *range(middle)]
        digests = _Pass(renderer, images, params_B1, order).digests
    except KdCacheError as refusal:
        parent.send({"error": refusal.as_document()})
        return refusal.exit_code
    parent.send({"digests": [digests[n] for n in range(len(images))]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
