"""Whether a teacher would be right far more often if the classes stood in another order.

A folder is read in the order of its names as text (0, 1, 10, 11, 2), while a teacher may have
learned the same classes as numbers. Such a teacher is right wherever both orders agree by chance,
so a bar on its accuracy alone lets it pass. Two tests find it: the orders that tools really use,
each held against all samples, and an order measured on three quarters of the samples and held
against the rest.

Shape letters: N samples, C classes of the dataset.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.human_format import natural_key

Ints = NDArray[np.int64]

NUM_FOLDS = 4
"""Parts of the samples; an order is measured on all but one part and judged on that one."""

NAMED_DEVIATIONS = 2.0
"""Standard deviations by which a known order must be better than the recorded one."""

MEASURED_DEVIATIONS = 2.5
"""The same for a measured order, of which there are many more to choose from."""

MEASURED_HANDICAP = 0.03
"""Accuracy that a measured order must have beyond a known one to be reported instead of it."""

MIN_HIT_RATE = 0.4
"""Least accuracy of a measured order on the classes that it moves. A weak teacher whose mistakes
have a pattern stays below."""

MAX_LOST = 0.25
"""Most samples of moved classes that the recorded order gets right, per sample of the measured
one."""

MIN_SAMPLES = 4
"""Fewest samples that must become right: fewer prove nothing."""

CERTAIN_SHARE = 0.9
"""Least share of a class's samples with the same output, for the output to be certain."""

MAX_EXAMPLES = 3
"""Classes that a message shows."""

MAX_LISTED = 20
"""Most classes whose outputs a message lists in full."""


class OtherOrder(NamedTuple):
    """An order of the classes under which the teacher is right more often.

    Attributes:
        description: what the teacher's classes look like, to follow "look like".
        accuracy: top-1 under that order; for a measured order, on samples that did not measure it.
        hint: the setting that gives the dataset this order.
        outputs: the output of each class, for a teacher of more classes, where the samples leave no
            doubt; else None.
    """

    description: str
    accuracy: float
    hint: str
    outputs: tuple[int, ...] | None = None


def find_other_order(
    predictions_N: Ints, labels_N: Ints, *, names: Sequence[str] = (), num_classes: int
) -> OtherOrder | None:
    """The order of classes that the teacher seems to have learned; None if it is the dataset's.

    Args:
        predictions_N: the teacher's top-1 outputs, which may be more than the dataset's classes.
        labels_N: labels of the dataset.
        names: class names by label; empty if the dataset has none.
        num_classes: C.
    """
    right_N = predictions_N == labels_N
    weights_N = 1 / np.bincount(labels_N, minlength=num_classes)[labels_N]
    found: list[tuple[float, OtherOrder]] = []
    for order in _known_orders(list(names), num_classes):
        other_N = predictions_N == order.outputs_C[labels_N]
        if _is_better(other_N, right_N, weights_N, NAMED_DEVIATIONS):
            accuracy = float(other_N.mean())
            found.append((accuracy, OtherOrder(order.description, accuracy, order.hint)))
    expected_N = _held_out_outputs(predictions_N, labels_N)
    other_N, moved_N = predictions_N == expected_N, expected_N != labels_N
    is_clear = (
        other_N[moved_N].sum() >= MIN_HIT_RATE * moved_N.sum()
        and right_N[moved_N].sum() <= MAX_LOST * other_N[moved_N].sum()
    )
    if is_clear and _is_better(other_N, right_N, weights_N, MEASURED_DEVIATIONS):
        hint, outputs = _hint(bool(names)), None
        if expected_N.max() >= num_classes:
            hint = _choose_outputs_hint(_measure(predictions_N, labels_N), num_classes)
            outputs = _certain_outputs(predictions_N, labels_N, num_classes)
        accuracy = float(other_N.mean())
        measured = OtherOrder(_describe(predictions_N, labels_N, names), accuracy, hint, outputs)
        found.append((accuracy - MEASURED_HANDICAP, measured))
    return max(found, key=lambda one: one[0])[1] if found else None


def _certain_outputs(
    predictions_N: Ints, labels_N: Ints, num_classes: int
) -> tuple[int, ...] | None:
    """The output of each class, where nearly all samples of every class have one of its own."""
    outputs = []
    for label in range(num_classes):
        answers = predictions_N[labels_N == label]
        if len(answers) < MIN_SAMPLES:
            return None
        output = int(np.bincount(answers).argmax())
        if (answers == output).mean() < CERTAIN_SHARE:
            return None
        outputs.append(output)
    return tuple(outputs) if len(set(outputs)) == num_classes else None


class _Known(NamedTuple):
    outputs_C: Ints  # the output that stands for each label
    description: str
    hint: str


def _known_orders(names: list[str], num_classes: int) -> list[_Known]:
    """Orders that libraries and scripts give to the same classes, without the dataset's own."""
    numbers = [str(label) for label in range(num_classes)]
    keys: list[tuple[list[str], Callable[[str], object], str, str]] = [
        (numbers, str, "the class numbers sorted as text (0, 1, 10, 11, 2)", _hint(bool(names)))
    ]
    if names:
        setting = "To read the classes in that order, set dataset.classes: {}."
        keys = [
            (names, natural_key, "the same names in natural order", setting.format("natural")),
            (names, str, "the same names sorted as text", setting.format("text")),
            (names, str.lower, "the same names sorted without regard to case", _hint(True)),
            *keys,
        ]
    labels = np.arange(num_classes)
    known = []
    for words, key, description, hint in keys:
        ordered = sorted(words, key=key)  # type: ignore[arg-type]
        rank = {name: place for place, name in enumerate(ordered)}
        if len(rank) == num_classes:  # names that occur twice have no order of their own
            outputs_C = np.array([rank[name] for name in words], np.int64)
            shown = ", ".join(_shorten(name) for name in ordered[:MAX_EXAMPLES])
            known.append(_Known(outputs_C, f"{description} ({shown}, ...)", hint))
    shifts = [
        (labels[::-1], "the same classes in reverse order"),
        (labels + 1, "the same classes one output later, as where output 0 is a background class"),
        (labels - 1, "the same classes one output earlier, as where labels start at 1"),
    ]
    known += [_Known(outputs_C, text, _hint(bool(names))) for outputs_C, text in shifts]
    return [order for order in known if (order.outputs_C != labels).any()]


def _hint(has_names: bool) -> str:
    if has_names:
        return "List the class names in the teacher's order under dataset.classes."
    return "Renumber the labels of the dataset as the teacher learned them."


def _choose_outputs_hint(moved: dict[int, int], num_classes: int) -> str:
    """For a teacher of more classes, some of whose further outputs are the dataset's classes."""
    hint = "Set teacher.classes to the output of each class, in the dataset's order"
    outputs = [moved.get(label, label) for label in range(num_classes)]
    if num_classes <= MAX_LISTED and len(set(outputs)) == num_classes:
        return f"{hint}; the scored views suggest {outputs}."
    return f"{hint}, by index, file or name."


def _is_better(
    other_N: NDArray[np.bool_],
    right_N: NDArray[np.bool_],
    weights_N: NDArray[np.float64],
    deviations: float,
) -> bool:
    """A sign test over the samples that only one of the two orders gets right.

    Each class weighs the same, because a teacher that confuses a rare class with a frequent one
    would otherwise gain by exchanging both.
    """
    gained_N, lost_N = other_N & ~right_N, right_N & ~other_N
    if gained_N.sum() < MIN_SAMPLES:
        return False
    signed_N = weights_N * (gained_N.astype(np.float64) - lost_N)
    return bool(signed_N.sum() >= deviations * np.sqrt((signed_N**2).sum()))


def _held_out_outputs(predictions_N: Ints, labels_N: Ints) -> Ints:
    """The output expected for each sample, measured on samples of the other folds."""
    folds_N = _number_within_class(labels_N) % NUM_FOLDS
    expected_N = labels_N.copy()
    for fold in range(NUM_FOLDS):
        judged = folds_N == fold
        measured = _measure(predictions_N[~judged], labels_N[~judged])
        expected_N[judged] = [measured.get(label, label) for label in labels_N[judged].tolist()]
    return expected_N


def _number_within_class(labels_N: Ints) -> Ints:
    order_N = np.argsort(labels_N, kind="stable")
    _, first, counts = np.unique(labels_N[order_N], return_index=True, return_counts=True)
    number_N = np.empty(len(labels_N), np.int64)
    number_N[order_N] = np.arange(len(labels_N)) - np.repeat(first, counts)
    return number_N


def _measure(predictions_N: Ints, labels_N: Ints) -> dict[int, int]:
    """One output for each label, the most frequent pairs first; no output serves two labels.

    Where the numbers do not decide, a label keeps its own output. Returns the labels that move.
    """
    pairs, counts = np.unique(np.stack([labels_N, predictions_N], 1), axis=0, return_counts=True)
    if not len(pairs):
        return {}
    totals = np.bincount(labels_N)
    rates = counts / totals[pairs[:, 0]]
    outputs: dict[int, int] = {}
    taken: set[int] = set()
    for row in np.lexsort((pairs[:, 1], pairs[:, 0], pairs[:, 0] != pairs[:, 1], -rates)):
        label, output = pairs[row].tolist()
        if label not in outputs and output not in taken:
            outputs[label] = output
            taken.add(output)
    return _without_open_chains(outputs)


def _without_open_chains(outputs: dict[int, int]) -> dict[int, int]:
    """Labels that exchange their outputs in a ring, or whose outputs belong to labels without
    samples.

    A teacher that never answers "cat" gives "dog" for cats and dogs; that is no exchange.
    """
    moved = {label: output for label, output in outputs.items() if label != output}
    while True:
        open_ends = [
            label for label, output in moved.items() if output in outputs and output not in moved
        ]
        if not open_ends:
            return moved
        for label in open_ends:
            del moved[label]


def _describe(predictions_N: Ints, labels_N: Ints, names: Sequence[str]) -> str:
    """The classes that moved, for example: another order, with output 3 for label 5."""

    def name(number: int) -> str:
        return repr(_shorten(names[number])) if number < len(names) else str(number)

    measured = _measure(predictions_N, labels_N)
    moved = [
        (float((predictions_N[labels_N == label] == output).mean()), label, output)
        for label, output in measured.items()
    ]
    shown = sorted(moved, key=lambda one: (-one[0], one[1]))[:MAX_EXAMPLES]
    examples = ", ".join(f"{name(output)} for {name(label)}" for _, label, output in shown)
    return f"the same classes in another order (it answers {examples})"


def _shorten(name: str) -> str:
    return name if len(name) <= 24 else name[:21] + "..."
