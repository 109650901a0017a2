"""`bench codec`: bytes of a row against what they lose of the teacher, for the codecs here and for
others of the field.

The answers come from a cache that holds every class (`dense` or `features`). What is lost is the KL
divergence of the decoded distribution from the teacher's at several temperatures, and the error of
the gradient that a student gets. Methods that fit something to the answers fit it to the samples of
even rank and are measured, as all are, on the others.

Shape letters: S seeds, N samples or views, C classes, D channels, K kept classes.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_service.errors import ConfigError, UnsupportedError
from cache_service.format.codecs import (
    ArrayMath,
    BaseCodec,
    Decoding,
    DenseCodec,
    FeaturesCodec,
    Floats,
    Head,
    Int8Codec,
    TopKCodec,
)
from cache_service.rows.reader import open_cache
from cli.experiments.bench.page import BenchOptions, BenchPage, Figures, Goal
from cli.experiments.svg import LineChart, Series, line_picture

STYLE_SHEET = Path(__file__).parents[1] / "report.css"

OWN = "kd-cache"
"""Source of the codecs that a build file can name."""

SMALL_ROW = 200
"""Bytes of the row of the goal: those of a uniform tail of the top 50."""

TEMPERATURES = (1, 2, 4, 8)
GRADIENT_AT = (1, 4)
"""Temperatures at which gradients are compared."""

KEPT = (4, 10, 16, 24, 50, 92, 200)
"""Numbers of kept classes, as far as there are more classes than that."""

ROUNDS = 7
"""Times that a codec encodes the rows, to take the median."""

RANKS = (48, 100, 200)
"""Dimensions that low-rank methods keep."""

CODE_BYTES = (48, 92, 184)
"""Bytes of the bit-allocated transform code."""

QUICK_SIZE = {"seeds": 2, "samples": 32, "classes": 120, "channels": 60}

PLOTTED = (
    "uniform tail",
    "topk",
    "topk packed",
    "transform code",
    "transform code + top",
    "low rank, int8",
)
"""Methods of the plot: their names without numbers."""

PLOTTED_BYTES = 512
"""Largest row of the plot: beyond it there are only nearly exact ones."""

Doubles = NDArray[np.float64]
Decoder = Callable[[float], Doubles]
"""Scores [N, C] by temperature T: the stored distribution is the softmax of scores / T."""


class Answers(NamedTuple):
    """A teacher's answers to the same samples under several seeds.

    Attributes:
        logits_SNC: float64.
        labels_N: the class of each sample, as far as it is known: the teacher's most frequent one.
        features_SND: inputs of the head, where the cache holds them.
        head: the head.
        name: where they are from.
    """

    logits_SNC: Doubles
    labels_N: NDArray[np.int64]
    features_SND: Doubles | None
    head: Head | None
    name: str


class RowFormat(NamedTuple):
    """A way of storing rows.

    Attributes:
        name: with its settings.
        source: who stores so.
        row_bytes: of one row, with nothing that is stored once a cache.
        decode: what is read.
        encoded_per_s: rows that one thread encodes in a second of CPU time, where it is a codec.
    """

    name: str
    source: str
    row_bytes: int
    decode: Decoder
    encoded_per_s: float | None = None


def measure_codec(options: BenchOptions) -> Iterator[Figures]:
    """Measure every method on the answers of a cache, or on made-up ones in the quick form."""
    answers = _read_answers(options.cache) if options.cache else _make_answers(options)
    fit, test = slice(0, None, 2), slice(1, None, 2)
    num_classes = answers.logits_SNC.shape[-1]
    logits_NC = answers.logits_SNC[:, test].reshape(-1, num_classes)
    # A student that has learned something: the answer to another view of the same sample.
    student_NC = np.roll(answers.logits_SNC, 1, axis=0)[:, test].reshape(-1, num_classes)
    figures: Figures = []
    for method in _methods(answers, fit, test):
        options.on_message(f"{method.name}: {method.row_bytes} bytes a row")
        figure: dict[str, Any] = {
            "method": method.name,
            "source": method.source,
            "row_bytes": method.row_bytes,
            "encoded_per_s": method.encoded_per_s,
            "answers": answers.name,
            "views": len(logits_NC),
            "classes": num_classes,
        }
        for temperature in TEMPERATURES:
            scores_NC = method.decode(temperature)
            figure[f"kl_{temperature}"] = _divergence(logits_NC, scores_NC, temperature)
            if temperature in GRADIENT_AT:
                figure[f"gradient_{temperature}"] = _gradient_error(
                    logits_NC, scores_NC, student_NC, temperature
                )
        figures.append(figure)
    yield figures


# The answers.


def _read_answers(url: str) -> Answers:
    cache = open_cache(url)
    spec, seeds = cache.spec, cache.complete_seeds()
    if spec.codec.drops_classes or spec.codec.rounding_error:
        raise UnsupportedError(
            f"bench codec needs answers to compare with, but {url} holds {spec.codec.describe()}.",
            hint="Record a cache with codec: {kind: features} or {kind: dense}.",
        )
    if len(seeds) < 2:
        raise ConfigError(
            f"bench codec needs two complete seeds, but {url} has {len(seeds)}.",
            hint="Record more of them: kd-cache build FILE --seeds 0:2",
        )
    head, count = cache.head(), spec.dataset.num_samples
    logits, features = [], []
    for seed in seeds:
        rows = cache.read(seed, 0, count)
        order = np.argsort(rows["sample"], kind="stable")
        rows = {name: values[order] for name, values in rows.items()}
        logits.append(spec.decode(rows, head=head)[:, 0].astype(np.float64))
        if head is not None and spec.stored_scales[0] == 1:
            features.append(rows["features"][:, 0].astype(np.float64))
    logits_SNC = np.stack(logits)
    labels_N = logits_SNC.mean(axis=0).argmax(axis=-1)
    name = f"{spec.teacher.model}, {count} samples of {spec.dataset.name}, {len(seeds)} seeds"
    features_SND = np.stack(features) if features else None
    return Answers(logits_SNC, labels_N, features_SND, head if features else None, name)


def _make_answers(options: BenchOptions) -> Answers:
    """Made-up answers of a linear head: they show that the benchmark works."""
    if not options.quick:
        raise ConfigError(
            "bench codec needs the answers of a real teacher: a cache with every class.",
            hint="Type: kd-cache bench codec --cache CACHE, or add --quick.",
        )
    rng = np.random.default_rng(0)
    num_seeds, count, classes, channels = QUICK_SIZE.values()
    means_ND = rng.normal(0, 1, (count, channels))
    features = np.maximum(means_ND + rng.normal(0, 0.5, (num_seeds, count, channels)), 0)
    weight = rng.normal(0, 1, (classes, channels)).astype(np.float32)
    head = Head(weight, np.zeros(classes, np.float32))
    logits = features @ weight.T.astype(np.float64)
    return Answers(logits, logits.mean(axis=0).argmax(-1), features, head, "made-up answers")


# What is lost.


def log_softmax(scores_NC: Doubles, temperature: float) -> Doubles:
    """Log probabilities at a temperature; a score of -inf has the probability 0."""
    scaled_NC = scores_NC / temperature
    scaled_NC = scaled_NC - scaled_NC.max(axis=-1, keepdims=True)
    log_NC: Doubles = scaled_NC - np.log(np.exp(scaled_NC).sum(axis=-1, keepdims=True))
    return log_NC


def _divergence(logits_NC: Doubles, scores_NC: Doubles, temperature: float) -> float | None:
    """Mean KL(teacher || decoded), nats; None, for infinite, where a class is impossible."""
    log_p, log_q = log_softmax(logits_NC, temperature), log_softmax(scores_NC, temperature)
    mean = float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())
    return mean if np.isfinite(mean) else None


def _gradient_error(
    logits_NC: Doubles, scores_NC: Doubles, student_NC: Doubles, temperature: float
) -> float:
    """Length of the error of d loss / d student logits over the gradient's, as roots of sums.

    The gradient of T**2 KL(teacher || student) is T (softmax(student / T) - softmax(teacher / T)).
    """
    p, q, z = (
        np.exp(log_softmax(each, temperature)) for each in (logits_NC, scores_NC, student_NC)
    )
    return float(np.sqrt(((p - q) ** 2).sum() / ((z - p) ** 2).sum()))


# The methods. Each of the field's is written as its source does it, at the bytes it would take.


def _methods(answers: Answers, fit: slice, test: slice) -> Iterator[RowFormat]:
    classes = answers.logits_SNC.shape[-1]
    logits_NC = answers.logits_SNC[:, test].reshape(-1, classes)
    num_seeds = len(answers.logits_SNC)
    labels_N1 = np.tile(answers.labels_N[test], num_seeds)[:, None]
    yield _codec(DenseCodec(), logits_NC, labels_N1, classes)
    yield _codec(Int8Codec(), logits_NC, labels_N1, classes)
    kept = [k for k in KEPT if k < classes]
    for k in kept:
        for packed in (False, True):
            codec = TopKCodec(k=k, packed=packed)
            yield _codec(codec, logits_NC, labels_N1, classes)
        yield from _distributions(logits_NC, k)
    if answers.features_SND is not None and answers.head is not None:
        channels = answers.features_SND.shape[-1]
        features_ND = answers.features_SND[:, test].reshape(-1, channels)
        for bits in (16, 8):
            features = FeaturesCodec(num_channels=channels, bits=bits)
            yield _codec(features, features_ND, labels_N1, classes, answers.head)
        fit_ND = answers.features_SND[:, fit].reshape(-1, channels)
        for rank in (rank for rank in RANKS if rank < channels):
            yield _low_rank(fit_ND, features_ND, answers.head, rank)
        for num_bytes in (num_bytes for num_bytes in CODE_BYTES if num_bytes < classes):
            yield _transform(fit_ND, features_ND, answers.head, num_bytes, 0, logits_NC)
            yield _transform(fit_ND, features_ND, answers.head, num_bytes, 8, logits_NC)


def _codec(
    codec: BaseCodec,
    answers_NX: Doubles,
    labels_N1: NDArray[np.int64],
    classes: int,
    head: Head | None = None,
) -> RowFormat:
    """A codec of this project, encoded and decoded by its own code."""
    answers = answers_NX[:, None].astype(np.float32)
    seconds = []
    for _ in range(ROUNDS):
        start = time.thread_time()
        rows = codec.encode(answers, labels_N1)
        seconds.append(time.thread_time() - start)

    def decode(temperature: float) -> Doubles:
        decoded: Floats = codec.decode(rows, Decoding(ArrayMath(), classes, temperature))[:, 0]
        if head is not None:
            decoded = decoded @ head.weight_CD.T + head.bias_C
        return decoded.astype(np.float64)

    row_bytes = sum(array.row_bytes for array in codec.arrays(1, classes))
    encoded_per_s = len(answers) / statistics.median(seconds)
    return RowFormat(codec.describe(), OWN, row_bytes, decode, encoded_per_s)


def _distributions(logits_NC: Doubles, k: int) -> Iterator[RowFormat]:
    """Methods that store the k largest probabilities at T = 1, or counts of sampled classes."""
    classes = logits_NC.shape[-1]
    log_p = log_softmax(logits_NC, 1)
    top_NK = np.argsort(-log_p, axis=-1, kind="stable")[:, :k]
    values_NK = np.take_along_axis(log_p, top_NK, axis=-1)
    rest_N = np.log(np.maximum(1 - np.exp(values_NK).sum(axis=-1), 1e-12) / (classes - k))
    uniform = _with_top(np.repeat(rest_N[:, None], classes, axis=-1), top_NK, values_NK)
    source = "FKD's marginal smoothing; TinyViT"
    yield RowFormat(f"uniform tail {k}", source, 4 * k, lambda _: uniform)
    renormalised = _with_top(np.full(log_p.shape, -np.inf), top_NK, values_NK)
    yield RowFormat(
        f"renormalised top {k}", "FKD's marginal re-norm", 4 * k, lambda _: renormalised
    )
    yield _sorted_tail(logits_NC, top_NK, k)
    yield _sampled(log_p, k)


def _with_top(scores_NC: Doubles, top_NK: NDArray[np.int64], values_NK: Doubles) -> Doubles:
    np.put_along_axis(scores_NC, top_NK, values_NK, axis=-1)
    return scores_NC


def _sorted_tail(
    logits_NC: Doubles, top_NK: NDArray[np.int64], k: int, degree: int = 3
) -> RowFormat:
    """The sorted tail as a polynomial of the rank. Which dropped class has which rank is unknown,
    so each gets the value of equal weight at the temperature."""
    sorted_NX = -np.sort(-logits_NC, axis=-1)[:, k:]
    places = np.linspace(-1, 1, sorted_NX.shape[1])
    powers = np.vander(places, degree + 1)
    fitted_NX = (np.linalg.lstsq(powers, sorted_NX.T, rcond=None)[0].T @ powers.T).astype(float)
    values_NK = np.take_along_axis(logits_NC, top_NK, axis=-1)

    def decode(temperature: float) -> Doubles:
        scaled = fitted_NX / temperature
        largest = scaled.max(axis=-1, keepdims=True)
        fill = temperature * (largest + np.log(np.exp(scaled - largest).mean(-1, keepdims=True)))
        return _with_top(np.repeat(fill, logits_NC.shape[1], axis=-1), top_NK, values_NK)

    name = f"polynomial tail {k}"
    return RowFormat(name, "sorted tail fitted, degree 3", 4 * k + 2 * (degree + 1), decode)


def _sampled(log_p: Doubles, k: int) -> RowFormat:
    """As many draws from the teacher's distribution at T = 1 as give about k different classes."""
    rng = np.random.default_rng(0)
    probabilities = np.exp(log_p)
    draws = k
    while True:
        counts = rng.multinomial(draws, probabilities / probabilities.sum(axis=-1, keepdims=True))
        different = float((counts > 0).sum(axis=-1).mean())
        if different >= k or draws > 500 * k:
            break
        draws = draws * 5 // 4 + 1
    with np.errstate(divide="ignore"):
        scores = np.log(counts / draws)
    source = f"sparse logit sampling (RS-KD), {draws} draws"
    return RowFormat(f"sampled {k}", source, round(3 * different), lambda _: scores)


def _low_rank(fit_ND: Doubles, features_ND: Doubles, head: Head, rank: int) -> RowFormat:
    """The head's input in its main directions as measured by the logits, 8 bits each."""
    basis_CR, mean_C, _ = _main_directions(fit_ND, head)
    basis_CR = basis_CR[:, :rank]
    centred = features_ND @ head.weight_CD.T.astype(np.float64) + head.bias_C - mean_C
    coefficients = centred @ basis_CR
    low, high = coefficients.min(-1, keepdims=True), coefficients.max(-1, keepdims=True)
    step = (high - low) / 255
    decoded = (np.rint((coefficients - low) / step) * step + low) @ basis_CR.T + mean_C
    return RowFormat(f"low rank {rank}, int8", "principal components", rank + 8, lambda _: decoded)


def _transform(
    fit_ND: Doubles, features_ND: Doubles, head: Head, num_bytes: int, k: int, logits_NC: Doubles
) -> RowFormat:
    """All main directions, each with as many bits as its variance deserves, and k classes exactly.

    Bits go where they lessen the squared error most (reverse water-filling); steps are Max's for a
    normal distribution, times the row's own scale.
    """
    basis_CX, mean_C, variance_X = _main_directions(fit_ND, head)
    bits_X = _allocate(variance_X, 8 * num_bytes)
    used = bits_X > 0
    basis, bits, deviation = basis_CX[:, used], bits_X[used], np.sqrt(variance_X[used])
    centred = features_ND @ head.weight_CD.T.astype(np.float64) + head.bias_C - mean_C
    scaled = (centred @ basis) / deviation
    scale_N1 = np.sqrt((scaled**2).mean(axis=-1, keepdims=True)).astype(np.float16)
    step = _MAX_STEPS[bits - 1] * scale_N1.astype(np.float64)
    half = 2.0 ** (bits - 1)
    levels = np.clip(np.floor((centred @ basis) / deviation / step), -half, half - 1)
    decoded = ((levels + 0.5) * step * deviation) @ basis.T + mean_C
    exact = ""
    if k:
        top_NK = np.argsort(-logits_NC, axis=-1, kind="stable")[:, :k]
        # The code does not keep what all logits have in common.
        values_NK = np.take_along_axis(logits_NC, top_NK, axis=-1) - centred.mean(-1, keepdims=True)
        decoded = _with_top(decoded, top_NK, values_NK)
        exact = f" + top {k}"
    name = f"transform code {num_bytes} B{exact}"
    return RowFormat(name, "reverse water-filling", num_bytes + 2 + 4 * k, lambda _: decoded)


_MAX_STEPS = np.array([1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.0569, 0.0308])
"""Steps of the best uniform quantizer of 2 to 256 levels of a unit normal (J. Max, 1960)."""

_MAX_ERRORS = np.array(
    [1, 0.3634, 0.1188, 0.03744, 0.01154, 0.003495, 0.001041, 0.0003035, 0.0000872]
)
"""Their mean squared errors, from no bits to 8."""

OWN_VARIANCE = 0.3
"""How much of each channel's own variance is added to the measured covariance of the features, so
that directions which few samples show are not given up."""


def _main_directions(fit_ND: Doubles, head: Head) -> tuple[Doubles, Doubles, Doubles]:
    """Orthonormal directions of the logits [C, X], their mean [C], and variances, descending."""
    weight_CD = head.weight_CD.astype(np.float64)
    weight_CD = weight_CD - weight_CD.mean(axis=0)  # a softmax does not see a common shift
    covariance = np.cov(fit_ND.T)
    covariance += OWN_VARIANCE * np.diag(np.diag(covariance))
    variance, basis = np.linalg.eigh(weight_CD @ covariance @ weight_CD.T)
    mean_C = fit_ND.mean(axis=0) @ head.weight_CD.T.astype(np.float64) + head.bias_C
    rank = min(len(variance) - 1, len(covariance))
    return basis[:, : -rank - 1 : -1], mean_C, variance[: -rank - 1 : -1]


def _allocate(variance_X: Doubles, num_bits: int) -> NDArray[np.int64]:
    """Up to 8 bits a direction, one after another where it lessens the squared error most."""
    gains_XB = variance_X[:, None] * -np.diff(_MAX_ERRORS)
    best = np.argsort(-gains_XB, axis=None, kind="stable")[:num_bits]
    return np.bincount(best // gains_XB.shape[1], minlength=len(variance_X))


# The page.


def codec_page(figures: Figures, options: BenchOptions) -> BenchPage:  # noqa: ARG001
    """The page of the figures, by bytes."""
    ordered = sorted(figures, key=lambda each: (each["row_bytes"], each["method"]))
    rows = [
        [
            each["method"],
            each["source"],
            str(each["row_bytes"]),
            *(_show(each[f"kl_{temperature}"]) for temperature in TEMPERATURES),
            *(_show(each[f"gradient_{temperature}"]) for temperature in GRADIENT_AT),
            f"{each['encoded_per_s']:,.0f}" if each["encoded_per_s"] else "",
            ", ".join(str(t) for t in TEMPERATURES if _is_best(each, ordered, f"kl_{t}")),
        ]
        for each in ordered
    ]
    header = [
        "method",
        "source",
        "bytes",
        *(f"KL, T = {temperature}" for temperature in TEMPERATURES),
        *(f"gradient, T = {temperature}" for temperature in GRADIENT_AT),
        "encoded a CPU second",
        "best at T",
    ]
    first = figures[0]
    note = (
        f"{first['answers']}; {first['views']} views of every second sample are measured, "
        f"{first['classes']} classes. Bytes are those of a row of one cell, without its digests "
        "and without what a cache stores once. KL is the mean of KL(teacher || decoded) in nats; "
        "the gradient's error is relative, for a student that answers what the teacher answers "
        "to another view. `best at T` names the temperatures at which no method of as few bytes "
        f"loses less. Only what has the source {OWN} can be named in a build file."
    )
    return BenchPage(
        "codec",
        "Bytes of a row, and what they lose",
        [note],
        header,
        rows,
        figures,
        goals=_goals(figures),
        plot=_plot(ordered),
    )


def _is_best(figure: dict[str, Any], others: Figures, key: str) -> bool:
    """Whether no method of as few bytes loses less."""
    return figure[key] is not None and figure[key] == min(
        other[key]
        for other in others
        if other["row_bytes"] <= figure["row_bytes"] and other[key] is not None
    )


def _goals(figures: Figures) -> list[Goal]:
    """At 200 bytes and T = 4, a tenth of what a uniform tail of the top 50 loses; at every
    temperature, no more than any method of the field."""
    uniform: list[float] = [each["kl_4"] for each in figures if each["method"] == "uniform tail 50"]
    small = [
        each["kl_4"] for each in figures if each["row_bytes"] <= SMALL_ROW and each["source"] == OWN
    ]
    what = f"least KL at T = 4 of {SMALL_ROW} bytes / that of a uniform tail 50"
    goals = [Goal(what, 0.1, min(small) / uniform[0])] if uniform else []
    return goals + [_frontier(figures, temperature) for temperature in TEMPERATURES]


def _frontier(figures: Figures, temperature: int) -> Goal:
    """Beside the method of the field that is best in comparison with codecs of no more bytes."""
    key = f"kl_{temperature}"
    own = [each for each in figures if each["source"] == OWN]
    smallest = min(each["row_bytes"] for each in own)
    ratio, worst = max(
        (
            min(o[key] for o in own if o["row_bytes"] <= each["row_bytes"]) / each[key],
            f"{each['method']} ({each['row_bytes']} B)",
        )
        for each in figures
        if each["source"] != OWN and each[key] is not None and each["row_bytes"] >= smallest
    )
    return Goal(
        f"largest ratio of KL at T = {temperature}: {OWN} in no more bytes / {worst}", 1.0, ratio
    )


def _plot(ordered: Figures) -> str:
    """KL over bytes, both as logarithms, at T = 1 and T = 4."""
    charts = []
    for temperature in (1, 4):
        key = f"kl_{temperature}"
        series = []
        for style, family in enumerate(PLOTTED):
            points = [
                (float(np.log2(each["row_bytes"])), float(np.log10(each[key])))
                for each in ordered
                if re.sub(r" \d+( B)?", "", each["method"]) == family
                and each["row_bytes"] <= PLOTTED_BYTES
            ]
            if points:
                x, y = zip(*points, strict=True)
                series.append(Series(family, y, style, x))
        values = [value for line in series for value in line.values]
        charts.append(
            (
                LineChart(
                    f"KL at T = {temperature} over the bytes of a row",
                    x_name="bytes a row",
                    y_name=f"KL(teacher || decoded), T = {temperature}",
                    first_x=int(min(x for line in series for x in line.x or ())),
                    low=float(np.floor(min(values))),
                    high=float(np.ceil(max(values))),
                    show=lambda value: f"{10**value:.2g}",
                    show_x=lambda value: f"{2**value:.0f}",
                ),
                series,
            )
        )
    return line_picture(charts, STYLE_SHEET.read_text())


def _show(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2g}"
