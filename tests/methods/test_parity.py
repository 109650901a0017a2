"""Every method learns from a cache what it learns from the teacher itself, step by step."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from support.recorded_runs import AUGMENT, CODECS, Variant

from cache_service.errors import UnsupportedError
from distill.methods import METHODS
from distill.stream import open_stream

BOUNDS = {"dense": 1e-3, "features": 2e-3, "int8": 2e-2}
"""Largest difference of any step's loss, nats. Losses are 2 to 300 and carry T**2 = 16 or more."""

MOVES = {"dense": 1e-4, "features": 1e-4, "int8": 2e-2}
"""Largest difference of what all gradients together did to the weights, as a share of it."""

TOPK_MOVES = 0.35
"""The same where half of the classes are dropped and the method asks about each of them."""

TOKENS = {
    "model": "distill.tokens:vit_tokens",
    "model_args": {
        "backbone": "vit_tiny_patch16_224",
        "num_tokens": 2,
        "img_size": 16,
        "patch_size": 8,
        "depth": 1,
        "embed_dim": 24,
        "num_heads": 2,
    },
}


class Row(NamedTuple):
    """A method as it is compared.

    `topk` bounds the difference relative to the loss, half of 12 classes dropped; None where the
    method refuses such a cache. `mixes` is false where it refuses mixed views. `loose` is a factor
    on what weights may differ by.
    """

    method: dict[str, Any]
    topk: float | None = 0.0
    num_teachers: int = 1
    student: dict[str, Any] | None = None
    mixes: bool = True
    epochs: int = 1
    steps: int = 5
    loose: float = 1.0

    @property
    def id(self) -> str:
        parts = "-".join(f"{value}" for value in self.method.values())
        return parts if self.student is None else f"{parts}-tokens"


FACTS = frozenset(Row._fields) - {"method"}


def row(name, **written):
    facts = {key: value for key, value in written.items() if key in FACTS}
    method = {key: value for key, value in written.items() if key not in FACTS}
    return Row({"name": name, **method}, **facts)


ROWS = [
    row("ce"),
    row("kd", topk=0.1),
    row("kd", topk=None, standardize=True),
    row("sd-kd", topk=0.1),
    row("sd-kd", topk=None, standardize=True),
    row("dkd", topk=0.15, warmup_epochs=0),
    row("dkd", topk=None, warmup_epochs=0, standardize=True),
    row("sd-dkd", topk=0.15, warmup_epochs=0),
    row("sd-dkd", topk=None, warmup_epochs=0, standardize=True),
    row("nkd", topk=2e-3, warmup_epochs=0),
    row("nkd", topk=2e-3, warmup_epochs=0, classes="all"),
    row("sd-nkd", topk=5e-3, warmup_epochs=0),
    row("sd-nkd", topk=5e-3, warmup_epochs=0, classes="others"),
    row("logits", topk=None),
    row("soft", topk=1e-2, num_teachers=2),
    row("soft", topk=1e-2, num_teachers=2, student=TOKENS, heads="each"),
    row("hard", topk=1e-2, num_teachers=2),
    row("hard", topk=1e-2, num_teachers=2, student=TOKENS, heads="each"),
    row("ensemble", topk=0.15, num_teachers=2),
    row("ensemble", topk=0.15, num_teachers=2, mean="geometric"),
    row("soft", topk=None, num_teachers=2, standardize=True),
    row("ensemble", topk=None, num_teachers=2, standardize=True),
    # Divides by the spread of each class over the batch, which is small: rounding counts for more.
    row("dist", topk=5e-2, loose=100.0),
    row("tf-kd"),
    row("tf-kd", topk=0.1, form="self"),
    row("peers", topk=0.1, teacher_weight=1, temperature=4),
    row("ddgsd", topk=0.1, mixes=False),
    row("ps-kd", mixes=False, epochs=2, steps=10),
    row("cs-kd", mixes=False),
    row("specialist", topk=0.1, mixes=False, steps=4, classes=(0, 2)),
]


def test_no_method_is_left_out_here():
    assert {each.method["name"] for each in ROWS} == METHODS.keys()


@pytest.mark.parametrize("augment", AUGMENT)
@pytest.mark.parametrize("each", ROWS, ids=lambda each: each.id)
def test_a_cache_teaches_as_its_teacher_does_at_every_step(recorded_runs, each, augment):
    changes = {"epochs": each.epochs}
    changes |= {} if each.student is None else {"student": each.student}

    def run(codec):
        return recorded_runs.run(
            Variant(codec, augment), each.method, num_teachers=each.num_teachers, **changes
        )

    if augment == "mixed" and not each.mixes:
        with pytest.raises(UnsupportedError, match="the recipe mixes samples"):
            run("dense")
        return
    live = run(None)
    assert len(live.losses) == each.steps
    for codec, bound in BOUNDS.items():
        assert run(codec).losses == pytest.approx(live.losses, abs=bound, rel=0), codec
        # Of int8 the bound is wide already.
        loose = 1.0 if codec == "int8" else each.loose
        assert share_of_move(run(codec), live) <= loose * MOVES[codec], codec
    if each.topk is None:
        with pytest.raises(UnsupportedError, match="keeps only the largest"):
            run("topk")
    else:
        assert run("topk").losses == pytest.approx(live.losses, rel=each.topk)
        assert share_of_move(run("topk"), live) <= (TOPK_MOVES if each.topk else 0.0)


def share_of_move(found, live):
    return float((found.moved_P - live.moved_P).norm() / live.moved_P.norm())


@pytest.mark.parametrize("augment", AUGMENT)
def test_a_topk_cache_never_drops_the_class_that_a_view_is_of(recorded_runs, augment):
    config = recorded_runs.config("unused", Variant("topk", augment), [0])
    stream = open_stream(config, device=torch.device("cpu"))
    live = recorded_runs.live(Variant(None, augment))
    num_beaten = 0
    for batch in stream.batches(0):
        decoded_BRC = stream.teacher_logits(batch, temperature=4.0, cache=0)
        exact_BRC = live.answer(batch.images_BHW3)
        kept_BRK = batch.rows[0]["classes"]
        for labels_B in (batch.labels_B, batch.partner_labels_B):
            assert (kept_BRK == labels_B[:, None, None]).any(dim=-1).all()
            index_BR1 = labels_B[:, None, None].expand(*decoded_BRC.shape[:2], 1)
            found, wanted = (each.gather(-1, index_BR1) for each in (decoded_BRC, exact_BRC))
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
            num_beaten += int(((exact_BRC > wanted).sum(dim=-1) >= CODECS["topk"]["k"]).sum())
    assert num_beaten > 100  # without the labels' privilege these would have been dropped
