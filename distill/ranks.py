"""Several processes that train the same students, and what they exchange.

`torchrun` starts one process per rank and tells each of them its rank. Every rank reads its slice
of each batch (see `BatchPlan`). After the exchanges of a step all ranks have the gradients, the
statistics and the means of the whole batch, so all of them make the same update, and rank 0 alone
writes files. `Ranks` is one process, which exchanges nothing. `JoinedRanks` exchanges control
messages by gloo, and tensors by gloo on CPUs and by NCCL on GPUs. All ranks make the same exchanges
in the same order.

Shape letters: B views of this rank, N views of all ranks, V values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from cache_service.errors import ConfigError, KdCacheError, WorkersError
from cache_service.human_format import one_line
from cache_service.processes import launched_rank
from distill.batch_norm import Exchange, GlobalBatchNorm
from distill.batches import Batch, BatchPlan
from distill.methods import PredictionHistory
from distill.methods.prediction_history import PastPredictions

T = TypeVar("T")

PATIENCE_S = 1800.0
"""How long a rank waits for another one that neither answers nor ends, beside waiting for rows. A
rank whose process ends is noticed at once."""


class Division(NamedTuple):
    """How one batch is divided among the ranks.

    Attributes:
        rank: whose random numbers this process draws.
        copies: number of ranks that have the views of this process.
        gather: function from a tensor with a row for each view of this process to the rows of all
            ranks, in order of position: [B, ...] -> [N, ...]. Gradients flow through it.
        statistics: context of forward passes, whose batch norms use the views of all ranks.
    """

    rank: int
    copies: int
    gather: Callable[[Tensor], Tensor]
    statistics: Callable[[], AbstractContextManager[Any]]


WHOLE = Division(0, 1, lambda rows: rows, nullcontext)
"""A batch that this process has whole."""


class Ranks:
    """The only process of a run."""

    rank, world = 0, 1

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def least(self, number: int) -> int:
        """The smallest number of all ranks."""
        return number

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 while the others wait; its result, or its error, on all ranks.

        Raises:
            KdCacheError: as raised on rank 0.
        """
        return work()

    def division(self, _plan: BatchPlan, _step: int) -> Division:
        """How the batch of a step is divided."""
        return WHOLE

    def count_views(self, _plan: BatchPlan, group: Sequence[Batch]) -> int:
        """The number of views of some batches, on all ranks together."""
        return sum(len(batch.labels_B) for batch in group)

    def add_up(self, _parameters: Iterable[nn.Parameter], values_V: Tensor) -> Tensor:
        """Sum gradients, in place, and some values over all ranks; return the values.

        A parameter without a gradient on every rank keeps none, and has 0 on those ranks that lack
        it otherwise.
        """
        return values_V

    def share_weights(self, _model: nn.Module) -> None:
        """Give all ranks the weights and buffers of rank 0."""

    def share_history(self, history: PredictionHistory) -> PredictionHistory:
        """The history of a student whose views are divided."""
        return history


ALONE = Ranks()


class JoinedRanks(Ranks):
    """One of several processes.

    Args:
        device: device of the students of this process.
        patience_s: how long to wait for a rank that does not answer.
    """

    def __init__(self, device: torch.device, patience_s: float) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        timeout = timedelta(seconds=patience_s)
        # Groups of its own: that of a calling program may not be able to send from a CPU.
        self._control: Any = distributed.new_group(backend="gloo", timeout=timeout)
        self._data: Any = self._control
        has_gpu = device.type == "cuda"
        if self.any(has_gpu) != (self.least(int(has_gpu)) == 1):
            raise ConfigError(
                f"some of the {self.world} processes train on a GPU and others on a CPU; this one "
                f"has {device}.",
                hint="Use `--set device=cpu`, or machines with a GPU for each process.",
            )
        if has_gpu:
            torch.cuda.set_device(device)
            self._data = distributed.new_group(backend="nccl", timeout=timeout)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.least(0 if flag else 1) == 0

    def least(self, number: int) -> int:
        """The smallest number of all ranks."""
        value = torch.tensor([number])
        with _reaching_others():
            distributed.all_reduce(value, distributed.ReduceOp.MIN, group=self._control)
        return int(value)

    def total(self, values: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in place."""
        with _reaching_others():
            distributed.all_reduce(values, group=self._data)
        return values

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 while the others wait; its result, or its error, on all ranks."""
        box: list[Any] = [None]
        if self.rank == 0:
            try:
                box = [work()]
            except KdCacheError as refusal:
                box = [refusal]
        with _reaching_others():
            distributed.broadcast_object_list(box, src=0, group=self._control)
        answer: Any = box[0]
        if isinstance(answer, KdCacheError):
            raise answer
        return cast(T, answer)

    def division(self, plan: BatchPlan, step: int) -> Division:
        """How the batch of a step is divided."""
        if len(plan.bounds(step)) <= plan.world:  # every rank reads it whole
            return WHOLE._replace(copies=self.world)
        norm = Exchange(self._stack, self.total)
        return Division(self.rank, 1, self.gather, lambda: GlobalBatchNorm(norm))

    def count_views(self, plan: BatchPlan, group: Sequence[Batch]) -> int:
        """The number of views of some batches, on all ranks together."""
        bounds = [plan.bounds(batch.cursor.step) for batch in group]
        return sum(each[-1] - each[0] for each in bounds)

    def add_up(self, parameters: Iterable[nn.Parameter], values_V: Tensor) -> Tensor:
        """Sum gradients, in place, and some values over all ranks; return the values."""
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        is_used = torch.tensor([parameter.grad is not None for parameter in trained]).int()
        with _reaching_others():
            distributed.all_reduce(is_used, distributed.ReduceOp.MAX, group=self._control)
        used = [each for each, is_one in zip(trained, is_used.tolist(), strict=True) if is_one]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in used if parameter.grad is not None]
        flat = self.total(torch.cat([values_V, *(each.flatten() for each in gradients)]))
        sizes = [len(values_V), *(each.numel() for each in gradients)]
        values_V, *sums = torch.split(flat, sizes)
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))
        return values_V

    @torch.no_grad()
    def share_weights(self, model: nn.Module) -> None:
        """Give all ranks the weights and buffers of rank 0."""
        for tensor in (*model.parameters(), *model.buffers()):
            own = tensor.contiguous()
            with _reaching_others():
                distributed.broadcast(own, src=0, group=self._data)
            tensor.copy_(own)

    def share_history(self, history: PredictionHistory) -> PredictionHistory:
        """The history of a student whose views are divided: rank 0 reads and writes it for all."""
        return _SharedHistory(history, self)

    def gather(self, rows_B: Tensor) -> Tensor:
        """The rows of all ranks, in order of rank. Gradients flow through it."""
        before, after = self.places(len(rows_B))
        padding = [rows_B.new_zeros(count, *rows_B.shape[1:]) for count in (before, after)]
        rows_N = torch.cat([padding[0], rows_B, padding[1]])
        summed_N: Tensor = _Total.apply(rows_N, self)
        return summed_N

    def places(self, count: int) -> tuple[int, int]:
        """How many rows the ranks before and after this one have, where this one has `count`."""
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = count
        with _reaching_others():
            distributed.all_reduce(counts, group=self._control)
        return int(counts[: self.rank].sum()), int(counts[self.rank + 1 :].sum())

    def _stack(self, own: Tensor) -> Tensor:
        every = [torch.empty_like(own) for _ in range(self.world)]
        with _reaching_others():
            distributed.all_gather(every, own, group=self._data)
        return torch.stack(every)


class _Total(torch.autograd.Function):
    """The sum over all ranks. Its gradient on each rank is that of all ranks' losses together."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: JoinedRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.total(values.clone())

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.total(slope.clone()), None


class _SharedHistory(PredictionHistory):
    """The predictions of all ranks, which rank 0 alone keeps."""

    def __init__(self, kept: PredictionHistory, ranks: JoinedRanks) -> None:
        self._kept, self._ranks = kept, ranks

    def write(self, epoch: int, samples_B: Tensor, logits_BC: Tensor) -> None:
        """Store the logits of all ranks."""
        samples_N, logits_NC = self._ranks.gather(samples_B), self._ranks.gather(logits_BC)
        self._ranks.on_first(lambda: self._kept.write(epoch, samples_N, logits_NC))

    def read(self, epoch: int, samples_B: Tensor) -> PastPredictions:
        """The predictions for the samples of this rank."""
        before, _ = self._ranks.places(len(samples_B))
        samples_N = self._ranks.gather(samples_B).cpu()
        found = self._ranks.on_first(lambda: self._kept.read(epoch, samples_N))
        own = slice(before, before + len(samples_B))
        return PastPredictions(*(each[own].to(samples_B.device) for each in found))

    def sync(self) -> None:
        """Flush everything to disk."""
        self._ranks.on_first(self._kept.sync)

    def prune(self, step: int, *, steps_per_epoch: int) -> None:
        """Remove the epochs that a run resumed at this step does not read."""
        self._ranks.on_first(lambda: self._kept.prune(step, steps_per_epoch=steps_per_epoch))


@contextmanager
def join_ranks(device: torch.device, *, wait_s: float = 0.0) -> Iterator[Ranks]:
    """Join the other processes that torchrun started, if there are any.

    Args:
        device: device of the students of this process.
        wait_s: how long any rank may wait for its rows.

    Raises:
        WorkersError: a process ends or cannot be reached.
    """
    rank, world = launched_rank()
    if world == 1:
        yield ALONE
        return
    is_new, patience_s = not distributed.is_initialized(), PATIENCE_S + wait_s
    with _reaching_others():
        if is_new:
            timeout = timedelta(seconds=patience_s)
            distributed.init_process_group(
                "gloo", store=_store(timeout), rank=rank, world_size=world, timeout=timeout
            )
        ranks = JoinedRanks(device, patience_s)
    try:
        yield ranks
        # A process that ends makes torchrun stop the others, and rank 0 may still be writing.
        ranks.any(False)
    except StoppedTogether:
        ranks.any(False)
        raise
    finally:
        if is_new:
            distributed.destroy_process_group()


def _store(timeout: timedelta) -> Any:
    """Where the ranks of this start find each other.

    By default torchrun keeps one store when it starts the processes of a machine again, and that
    has the addresses of those that ended. Between machines its rendezvous makes a new one.
    """
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]:
        return store
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(  # type: ignore[attr-defined]
        f"start-{start}", store
    )


class StoppedTogether(KeyboardInterrupt):
    """All ranks stop after the same step, because a signal reached one of them."""


def own_device(name: str) -> str:
    """The device of this process, for the `device` of a train file.

    Raises:
        ConfigError: it is one GPU, which several processes would share, or there are too few.
    """
    _, world = launched_rank()
    if world == 1 or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return name
    if name not in ("auto", "cuda"):
        raise ConfigError(
            f"device: {name} was requested for each of {world} processes.",
            hint="Use `--set device=cuda`, which gives each process a GPU of its own.",
        )
    place, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= num_gpus:
        raise ConfigError(
            f"device: {name} was requested by process {place + 1} of this machine, which has "
            f"{num_gpus} GPUs that torch can use.",
            hint=f"Use `torchrun --nproc-per-node {num_gpus}`, or `--set device=cpu`.",
        )
    return f"cuda:{place}"


@contextmanager
def _reaching_others() -> Iterator[None]:
    try:
        yield
    except RuntimeError as problem:
        raise WorkersError(
            f"another process of this run ended or cannot be reached: {one_line(problem)}",
            hint="What it printed says why; the same command resumes.",
        ) from problem
