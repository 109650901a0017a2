"""Specialists around a generalist: whom to train, and all of them together at use.

A specialist is trained by `method: {name: specialist, classes: [...]}`. Shape letters: B batch,
C classes, M specialists, S outputs of one: its classes, then the dustbin for all others.

Source: Hinton et al. 2015, section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cache_service.errors import ConfigError
from cache_service.models.preprocess import prepare_views
from cache_service.remote.source import RowSource
from distill.batches import Batch
from distill.checkpoint import Payload, load_checkpoint
from distill.config import TrainConfig
from distill.data import tensors_of
from distill.losses import (
    active_specialists,
    combine_specialists,
    correct_dustbin,
    dustbin_logits,
    majority_labels,
)
from distill.methods.specialist import Specialist as SpecialistSettings
from distill.scores import Evaluation, Tally
from distill.students import Student, choose_device, restore_student
from distill.targets import TargetDecoder

Answer = Callable[[Batch], Tensor]
"""Views to logits [B, C]: of a network, or of the cache that recorded these views."""

ROWS = 4096
"""Recorded rows read at a time."""


class Specialist(NamedTuple):
    """One specialist as it is asked.

    Attributes:
        answer: its logits over all C classes; those outside of `classes` count together.
        classes: its subset.
        oversampling: how much more often than they really are its classes were shown to it,
            against all others. 1 takes nothing back.
    """

    answer: Answer
    classes: tuple[int, ...]
    oversampling: float = 1.0


class Together(NamedTuple):
    """Scores of a generalist alone, and with its specialists.

    Attributes:
        generalist: alone, over all views.
        combined: with its specialists.
        members: both, alone and combined, over the views of each specialist's classes.
        asked: share of views for which each specialist was asked.
    """

    generalist: Evaluation
    combined: Evaluation
    members: tuple[tuple[Evaluation, Evaluation], ...]
    asked: tuple[float, ...]


def prediction_covariance(
    cache: RowSource, *, seeds: Sequence[int] | None = None, temperature: float = 1.0
) -> Tensor:
    """Covariance of a generalist's recorded class probabilities, float64 [C, C].

    Positive where two classes are likely for the same views, which is where they are confused.

    Args:
        cache: of the generalist.
        seeds: recorded epochs to read; by default the first complete one.
        temperature: T > 0; above 1 lets a certain generalist show its doubts.

    Raises:
        RowsNotBuiltError, CorruptError: see `RowSource.read`.
    """
    chosen = cache.complete_seeds()[:1] if seeds is None else seeds
    count, num_classes = 0, cache.spec.teacher.num_classes
    sum_C = torch.zeros(num_classes, dtype=torch.float64)
    outer_CC = torch.zeros(num_classes, num_classes, dtype=torch.float64)
    for logits_BC in _recorded_logits(cache, chosen, temperature):
        p_BC = torch.softmax(logits_BC.double() / temperature, dim=-1)
        count += len(p_BC)
        sum_C += p_BC.sum(dim=0)
        outer_CC += p_BC.T @ p_BC
    if not count:
        raise ConfigError(f"{cache.url} has no complete seed to learn confusions from.")
    mean_C = sum_C / count
    return outer_CC / count - torch.outer(mean_C, mean_C)


def confusable_subsets(
    covariance_CC: Tensor, *, num_subsets: int, seed: int = 0, restarts: int = 10
) -> list[tuple[int, ...]]:
    """Subsets of classes that are predicted together, for a specialist each.

    The columns of the covariance are clustered by k-means. Subsets of one class are left out, so
    there may be fewer than `num_subsets`.

    Args:
        covariance_CC: from `prediction_covariance`.
        num_subsets: k, at most C.
        seed: of the starts.
        restarts: the best of so many is taken.

    Source: Hinton et al. 2015, section 5.3, with an on-line k-means of which they say no more.
    """
    columns_CC = covariance_CC.T.double()
    if not 1 <= num_subsets <= len(columns_CC):
        raise ConfigError(
            f"num_subsets={num_subsets} of {len(columns_CC)} classes is not possible."
        )
    drawn = torch.Generator().manual_seed(seed)
    found = [_cluster(columns_CC, num_subsets, drawn) for _ in range(restarts)]
    _, cluster_C = min(found, key=lambda each: each[0])
    subsets = [torch.nonzero(cluster_C == k).flatten().tolist() for k in range(num_subsets)]
    return sorted(tuple(subset) for subset in subsets if len(subset) > 1)


def combine(
    generalist_BC: Tensor,
    specialists_BC: Sequence[Tensor],
    specialists: Sequence[Specialist],
    *,
    top: int = 1,
) -> tuple[Tensor, Tensor]:
    """Probabilities of all together, float64 [B, C], and who was asked, bool [B, M].

    Args:
        generalist_BC: its logits.
        specialists_BC: logits of each, over all classes.
        specialists: who they are.
        top: a specialist is asked where it holds one of the generalist's so many likeliest classes.
    """
    generalist_p_BC = torch.softmax(generalist_BC.double(), dim=-1)
    subsets = [torch.tensor(each.classes, device=generalist_BC.device) for each in specialists]
    if not subsets:
        return generalist_p_BC, torch.zeros(len(generalist_BC), 0, dtype=torch.bool)
    asked_BM = active_specialists(generalist_p_BC, subsets, top=top)
    answers = [
        torch.softmax(
            correct_dustbin(
                dustbin_logits(logits.double(), subset), oversampling=each.oversampling
            ),
            dim=-1,
        )
        for logits, subset, each in zip(specialists_BC, subsets, specialists, strict=True)
    ]
    found = combine_specialists(
        generalist_p_BC, answers, subsets, active_BM=asked_BM, tolerance=1e-6, max_steps=1000
    )
    return found.q_BC, asked_BM


@torch.inference_mode()
def evaluate_together(
    batches: Iterable[Batch],
    generalist: Answer,
    specialists: Sequence[Specialist],
    *,
    top: int = 1,
    device: torch.device | None = None,
) -> Together:
    """Score a generalist alone and with its specialists, over the same views.

    Args:
        batches: such as `distill.evaluate.HeldOut`.
        generalist: networks and caches do alike: `open_answer`, or a stream's `teacher_logits`.
        specialists: from `open_specialist`, or of caches.
        top: see `combine`.
        device: where they answer; the CPU by default.

    Raises:
        ConfigError: there are no views, or none of a specialist's classes.
    """
    where = device or torch.device("cpu")
    alone, together = Tally(where), Tally(where)
    members = [(Tally(where), Tally(where)) for _ in specialists]
    num_asked = torch.zeros(len(specialists), dtype=torch.float64)
    for given in batches:
        batch = given.to(str(where))
        labels_B = majority_labels(*batch[1:4])
        generalist_BC = generalist(batch).float()
        q_BC, asked_BM = combine(
            generalist_BC, [each.answer(batch) for each in specialists], specialists, top=top
        )
        # A class at exactly 0 would be a loss without end in one view.
        log_q_BC = q_BC.clamp(min=torch.finfo(torch.float32).tiny).log().float()
        num_asked += asked_BM.double().sum(dim=0).cpu()
        for tally, logits_BC in ((alone, generalist_BC), (together, log_q_BC)):
            tally.add(logits_BC, labels_B)
        for each, pair in zip(specialists, members, strict=True):
            own_B = torch.isin(labels_B, torch.tensor(each.classes, device=where))
            for tally, logits_BC in zip(pair, (generalist_BC, log_q_BC), strict=True):
                tally.add(logits_BC[own_B], labels_B[own_B])
    whole = alone.evaluation()
    return Together(
        whole,
        together.evaluation(),
        tuple((one.evaluation(), other.evaluation()) for one, other in members),
        tuple((num_asked / whole.num_samples).tolist()),
    )


def open_answer(path: str | Path, *, device: torch.device | None = None) -> Answer:
    """The student of a checkpoint, in evaluation mode: views to logits [B, C]."""
    payload = _payload(path)
    config = TrainConfig.model_validate(payload["config"])
    return _answer(restore_student(payload, config.student), device or choose_device("cpu"))


def open_specialist(path: str | Path, *, device: torch.device | None = None) -> Specialist:
    """The specialist of a checkpoint, with its classes and what its samples favored.

    Raises:
        ConfigError: it was trained by another method.
    """
    payload = _payload(path)
    config = TrainConfig.model_validate(payload["config"])
    settings = config.method
    if not isinstance(settings, SpecialistSettings):
        raise ConfigError(
            f"{path} was trained by method {settings.name}, not as a specialist.",
            hint="Train one with `method: {name: specialist, classes: [...]}`.",
        )
    answer = _answer(restore_student(payload, config.student), device or choose_device("cpu"))
    return Specialist(answer, settings.classes, payload["identity"]["oversampling"])


def _payload(path: str | Path) -> Payload:
    payload = load_checkpoint(path)
    if payload is None:
        raise ConfigError(f"no checkpoint at {path}.", hint="Name the `out` of a training run.")
    return payload


def _answer(student: Student, device: torch.device) -> Answer:
    model = student.model.to(device).eval()

    def answer(batch: Batch) -> Tensor:
        seen = prepare_views(batch.images_BHW3, student.preprocess, device=device)
        logits_BC: Tensor = model(seen)
        return logits_BC.float()

    return answer


def _recorded_logits(
    cache: RowSource, seeds: Sequence[int], temperature: float
) -> Iterator[Tensor]:
    decoder = TargetDecoder(cache.spec, cache.head(), device="cpu")
    num_samples = cache.spec.dataset.num_samples
    for seed in seeds:
        for start in range(0, num_samples, ROWS):
            rows = cache.read(seed, start, min(start + ROWS, num_samples))
            tensors = tensors_of(rows, decoder.array_names)
            yield decoder.logits(tensors, temperature=temperature)[:, 0]


def _cluster(rows_CD: Tensor, count: int, drawn: torch.Generator) -> tuple[float, Tensor]:
    """Sum of squared distances and cluster of each row, by Lloyd's steps from k-means++."""
    first = int(torch.randint(len(rows_CD), (1,), generator=drawn))
    centers_KD = rows_CD[first : first + 1]
    while len(centers_KD) < count:
        gap_C = torch.cdist(rows_CD, centers_KD).amin(dim=1).square()
        # Where every row is a center already, any other will do.
        weights_C = gap_C if bool(gap_C.sum() > 0) else torch.ones_like(gap_C)
        chosen = torch.multinomial(weights_C, 1, generator=drawn)
        centers_KD = torch.cat([centers_KD, rows_CD[chosen]])
    cluster_C = torch.full((len(rows_CD),), -1)
    while True:
        gap_CK = torch.cdist(rows_CD, centers_KD)
        nearest_C = gap_CK.argmin(dim=1)
        if bool((nearest_C == cluster_C).all()):
            return float(gap_CK.amin(dim=1).square().sum()), cluster_C
        cluster_C = nearest_C
        for k in sorted(set(cluster_C.tolist())):
            centers_KD[k] = rows_CD[cluster_C == k].mean(dim=0)
