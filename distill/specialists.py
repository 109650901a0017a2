"""Chooses the classes of specialists and combines specialists and generalist at inference.

A specialist is trained with `method: {name: specialist, classes: [...]}`. Shape letters: B batch,
C classes, M specialists, S outputs of a specialist: its classes, then a dustbin class for all
other classes.

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
from cache_service.rows.reader import Cache
from distill.batches import Batch
from distill.checkpoint import Payload, load_checkpoint
from distill.config import TrainConfig
from distill.losses import (
    active_specialists,
    combine_specialists,
    correct_dustbin,
    dustbin_logits,
    majority_labels,
)
from distill.methods.specialist import Specialist as SpecialistSettings
from distill.scores import Evaluation, Tally
from distill.students import choose_device, restore_student
from distill.targets import TargetDecoder, tensors_of

Classifier = Callable[[Batch], Tensor]
"""Function from a batch to logits [B, C]: a network, or a cache that recorded these views."""

ROWS_AT_A_TIME = 4096
"""Number of rows that are decoded at a time: 1.6 MB of logits at 100 classes."""


class Specialist(NamedTuple):
    """One specialist at inference.

    Attributes:
        classify: function that returns logits of all C classes. The classes outside `classes` are
            merged into the dustbin class.
        classes: labels of its subset.
        oversampling: factor by which its classes, relative to all others, were more frequent in
            training than in the dataset. 1 means no correction.
    """

    classify: Classifier
    classes: tuple[int, ...]
    oversampling: float = 1.0


class Together(NamedTuple):
    """Scores of a generalist alone, and combined with its specialists.

    Attributes:
        generalist: scores of the generalist alone, over all views.
        combined: scores of the combination, over all views.
        members: for each specialist, both scores over the views of its classes.
        active: fraction of views for which each specialist was active.
    """

    generalist: Evaluation
    combined: Evaluation
    members: tuple[tuple[Evaluation, Evaluation], ...]
    active: tuple[float, ...]


def prediction_covariance(
    cache: Cache, *, seeds: Sequence[int] | None = None, temperature: float = 1.0
) -> Tensor:
    """Return the covariance of a generalist's recorded class probabilities, float64 [C, C].

    An entry is positive if two classes are probable for the same views, that is, if the generalist
    confuses them.

    Args:
        cache: recorded logits of the generalist.
        seeds: recorded epochs to read; by default the first complete one.
        temperature: T > 0. Values above 1 increase the probabilities of less likely classes.

    Raises:
        ConfigError: no seed is complete.
        RowsNotBuiltError, CorruptError: see `Cache.read`.
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
        raise ConfigError(f"{cache.url} has no complete seed to compute confusions from.")
    mean_C = sum_C / count
    return outer_CC / count - torch.outer(mean_C, mean_C)


def _recorded_logits(cache: Cache, seeds: Sequence[int], temperature: float) -> Iterator[Tensor]:
    decoder = TargetDecoder(cache.spec, cache.head(), device="cpu")
    num_samples = cache.spec.dataset.num_samples
    for seed in seeds:
        for start in range(0, num_samples, ROWS_AT_A_TIME):
            rows = cache.read(seed, start, min(start + ROWS_AT_A_TIME, num_samples))
            tensors = tensors_of(rows, decoder.array_names)
            yield decoder.logits(tensors, temperature=temperature)[:, 0]


def confusable_subsets(
    covariance_CC: Tensor, *, num_subsets: int, seed: int = 0, restarts: int = 10
) -> list[tuple[int, ...]]:
    """Find subsets of classes that are predicted together, one subset for each specialist.

    The columns of the covariance are clustered by k-means. Subsets of one class are dropped, so the
    result may have fewer than `num_subsets` subsets.

    Args:
        covariance_CC: from `prediction_covariance`.
        num_subsets: k, at most C.
        seed: seed of the random initial centers.
        restarts: number of runs of k-means. The result with the smallest error is returned.

    Raises:
        ConfigError: k is not between 1 and C.

    Source: Hinton et al. 2015, section 5.3, who use an on-line version of k-means.
    """
    columns_CC = covariance_CC.T.double()
    if not 1 <= num_subsets <= len(columns_CC):
        raise ConfigError(
            f"num_subsets={num_subsets} of {len(columns_CC)} classes is not possible."
        )
    generator = torch.Generator().manual_seed(seed)
    results = [_k_means(columns_CC, num_subsets, generator) for _ in range(restarts)]
    _, cluster_C = min(results, key=lambda result: result[0])
    subsets = [torch.nonzero(cluster_C == k).flatten().tolist() for k in range(num_subsets)]
    return sorted(tuple(subset) for subset in subsets if len(subset) > 1)


def _k_means(rows_CD: Tensor, count: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """Cluster rows by Lloyd's algorithm with k-means++ initialization.

    Returns the sum of squared distances and the cluster of each row.
    """
    first = int(torch.randint(len(rows_CD), (1,), generator=generator))
    centers_KD = rows_CD[first : first + 1]
    while len(centers_KD) < count:
        gap_C = torch.cdist(rows_CD, centers_KD).amin(dim=1).square()
        # If every row equals a center, all weights are 0 and any row may become the next center.
        weights_C = gap_C if bool(gap_C.sum() > 0) else torch.ones_like(gap_C)
        chosen = torch.multinomial(weights_C, 1, generator=generator)
        centers_KD = torch.cat([centers_KD, rows_CD[chosen]])
    # -1 is no cluster, so the first assignment always counts as a change.
    cluster_C = torch.full((len(rows_CD),), -1)
    while True:
        gap_CK = torch.cdist(rows_CD, centers_KD)
        nearest_C = gap_CK.argmin(dim=1)
        if bool((nearest_C == cluster_C).all()):
            return float(gap_CK.amin(dim=1).square().sum()), cluster_C
        cluster_C = nearest_C
        # A cluster without rows keeps its center, because the mean of no rows is NaN.
        for k in sorted(set(cluster_C.tolist())):
            centers_KD[k] = rows_CD[cluster_C == k].mean(dim=0)


def combine(
    generalist_BC: Tensor,
    specialists_BC: Sequence[Tensor],
    specialists: Sequence[Specialist],
    *,
    top: int = 1,
) -> tuple[Tensor, Tensor]:
    """Combine a generalist with its specialists.

    Args:
        generalist_BC: logits of the generalist.
        specialists_BC: logits of each specialist, over all classes.
        specialists: the specialists, in the same order.
        top: a specialist is active for a view if it has one of the `top` classes that the
            generalist finds most likely.

    Returns:
        Combined probabilities, float64 [B, C], and the active specialists, bool [B, M].
    """
    generalist_p_BC = torch.softmax(generalist_BC.double(), dim=-1)
    subsets = [torch.tensor(each.classes, device=generalist_BC.device) for each in specialists]
    if not subsets:
        return generalist_p_BC, torch.zeros(len(generalist_BC), 0, dtype=torch.bool)
    active_BM = active_specialists(generalist_p_BC, subsets, top=top)
    folded = (
        dustbin_logits(logits_BC.double(), subset)
        for logits_BC, subset in zip(specialists_BC, subsets, strict=True)
    )
    specialist_ps = [
        torch.softmax(correct_dustbin(logits_BS, oversampling=each.oversampling), dim=-1)
        for logits_BS, each in zip(folded, specialists, strict=True)
    ]
    combination = combine_specialists(
        generalist_p_BC,
        specialist_ps,
        subsets,
        active_BM=active_BM,
        tolerance=1e-6,
        max_steps=1000,
    )
    return combination.q_BC, active_BM


@torch.inference_mode()
def evaluate_together(
    batches: Iterable[Batch],
    generalist: Classifier,
    specialists: Sequence[Specialist],
    *,
    top: int = 1,
    device: torch.device | None = None,
) -> Together:
    """Evaluate a generalist alone and combined with its specialists, over the same views.

    Args:
        batches: views and labels, such as `distill.evaluate.HeldOut`.
        generalist: classifier from `open_answer`, or one that returns a stream's
            `teacher_logits` of the whole image.
        specialists: specialists from `open_specialist`, or ones that read caches.
        top: see `combine`.
        device: device of the classifiers; by default the CPU.

    Raises:
        ConfigError: there are no views, or no views of the classes of a specialist.
    """
    device = device or torch.device("cpu")
    alone, together = Tally(device), Tally(device)
    members = [(Tally(device), Tally(device)) for _ in specialists]
    num_active = torch.zeros(len(specialists), dtype=torch.float64)
    for each_batch in batches:
        batch = each_batch.to(str(device))
        labels_B = majority_labels(*batch[1:4])
        generalist_BC = generalist(batch).float()
        q_BC, active_BM = combine(
            generalist_BC, [each.classify(batch) for each in specialists], specialists, top=top
        )
        # A probability of exactly 0 for the label would make the mean loss infinite.
        log_q_BC = q_BC.clamp(min=torch.finfo(torch.float32).tiny).log().float()
        num_active += active_BM.double().sum(dim=0).cpu()
        for tally, logits_BC in ((alone, generalist_BC), (together, log_q_BC)):
            tally.add(logits_BC, labels_B)
        for each, pair in zip(specialists, members, strict=True):
            own_B = torch.isin(labels_B, torch.tensor(each.classes, device=device))
            for tally, logits_BC in zip(pair, (generalist_BC, log_q_BC), strict=True):
                tally.add(logits_BC[own_B], labels_B[own_B])
    whole = alone.evaluation()
    return Together(
        whole,
        together.evaluation(),
        tuple((one.evaluation(), other.evaluation()) for one, other in members),
        tuple((num_active / whole.num_samples).tolist()),
    )


def open_answer(path: str | Path, *, device: torch.device | None = None) -> Classifier:
    """Load the student of a checkpoint in evaluation mode, as a function to logits [B, C].

    Raises:
        ConfigError: there is no checkpoint.
    """
    return _classifier(_payload(path), device)


def open_specialist(path: str | Path, *, device: torch.device | None = None) -> Specialist:
    """Load the specialist of a checkpoint, with its classes and their oversampling.

    Raises:
        ConfigError: there is no checkpoint, or its student was trained by another method.
    """
    payload = _payload(path)
    settings = TrainConfig.model_validate(payload["config"]).method
    if not isinstance(settings, SpecialistSettings):
        raise ConfigError(
            f"{path} was trained by method {settings.name}, not as a specialist.",
            hint="Train one with `method: {name: specialist, classes: [...]}`.",
        )
    oversampling = payload["identity"]["oversampling"]
    return Specialist(_classifier(payload, device), settings.classes, oversampling)


def _payload(path: str | Path) -> Payload:
    payload = load_checkpoint(path)
    if payload is None:
        raise ConfigError(f"no checkpoint at {path}.", hint="Name the `out` of a training run.")
    return payload


def _classifier(payload: Payload, device: torch.device | None) -> Classifier:
    device = device or choose_device("cpu")
    student = restore_student(payload, TrainConfig.model_validate(payload["config"]).student)
    model = student.model.to(device).eval()

    def classify(batch: Batch) -> Tensor:
        images_B3HW = prepare_views(batch.images_BHW3, student.preprocess, device=device)
        logits_BC: Tensor = model(images_B3HW)
        return logits_BC.float()

    return classify
