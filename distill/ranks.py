"""Several processes that train the same students, and what they exchange.

`torchrun` starts one process per rank and tells each of them its rank. Every rank reads its slice
of each batch (see `BatchPlan`). During a step the ranks exchange the batch norm statistics, the
gradients and the mean losses of the whole batch, so all of them make the same update. Rank 0 alone
writes files.

`Ranks` is the only process of a run, and has nothing to exchange. `JoinedRanks` is one of several
processes. It exchanges control messages over gloo, and tensors over gloo on CPUs and over NCCL on
GPUs. All ranks must make the same exchanges in the same order.

Shape letters: B views of this rank, N views of all ranks, V values.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import cache
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

TIMEOUT_S = 1800.0
"""How long a rank waits in an exchange for a rank that does not answer, s. The time that a rank may
wait for its rows is added. The end of a process is noticed at once."""


class Division(NamedTuple):
    """How one batch is divided among the ranks.

    Attributes:
        rank: rank whose random numbers this process draws; 0 if all ranks read the same views.
        copies: number of ranks that read the same views; 1 if each rank has its own slice.
        gather: function from a tensor with one row per view of this rank to the rows of all ranks,
            in order of position: [B, ...] -> [N, ...]. Gradients flow through it.
        statistics: context for forward and backward passes in which batch norms compute their
            statistics over the views of all ranks.
    """

    rank: int
    copies: int
    gather: Callable[[Tensor], Tensor]
    statistics: Callable[[], AbstractContextManager[Any]]


WHOLE = Division(0, 1, lambda rows: rows, nullcontext)
"""A batch that this process reads as a whole."""


class Ranks:
    """The only process of a run."""

    rank, world = 0, 1

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return flag

    def smallest(self, number: int) -> int:
        """The smallest number of all ranks."""
        return number

    def sum_over_ranks(self, values: Tensor) -> Tensor:
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

    def broadcast_weights(self, _model: nn.Module) -> None:
        """Copy the weights and buffers of rank 0 to all ranks."""

    def shared_history(self, history: PredictionHistory) -> PredictionHistory:
        """Return the history that all ranks use together in place of the student's own."""
        return history


ONE_PROCESS = Ranks()


class JoinedRanks(Ranks):
    """One of several processes.

    Args:
        device: device of the students of this process.
        timeout_s: how long to wait for a rank that does not answer.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        timeout = timedelta(seconds=timeout_s)
        # Groups of its own: that of a calling program may not be able to send from a CPU.
        self._control: Any = distributed.new_group(backend="gloo", timeout=timeout)
        self._data: Any = self._control
        try:
            self._open_data(device, timeout)
        except BaseException:
            self.destroy_groups()
            raise

    def _open_data(self, device: torch.device, timeout: timedelta) -> None:
        has_gpu = device.type == "cuda"
        if self.any(has_gpu) != (self.smallest(int(has_gpu)) == 1):
            raise ConfigError(
                f"some of the {self.world} processes train on a GPU and others on a CPU; this one "
                f"has {device}.",
                hint="Use `--set device=cpu`, or machines with a GPU for each process.",
            )
        if has_gpu:
            torch.cuda.set_device(device)
            self._data = distributed.new_group(backend="nccl", timeout=timeout)

    def destroy_groups(self) -> None:
        """Destroy the groups of this object, and not that of a calling program."""
        if self._data is not self._control:
            distributed.destroy_process_group(self._data)
        distributed.destroy_process_group(self._control)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.smallest(0 if flag else 1) == 0

    def smallest(self, number: int) -> int:
        """The smallest number of all ranks."""
        value = torch.tensor([number])
        with _reaching_others():
            distributed.all_reduce(value, distributed.ReduceOp.MIN, group=self._control)
        return int(value)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
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
        if not plan.is_divided(step):
            return WHOLE._replace(copies=self.world)
        norm = Exchange(self._stack, self.sum_over_ranks)
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
        flat = self.sum_over_ranks(torch.cat([values_V, *(each.flatten() for each in gradients)]))
        sizes = [len(values_V), *(each.numel() for each in gradients)]
        values_V, *sums = torch.split(flat, sizes)
        for gradient, summed in zip(gradients, sums, strict=True):
            gradient.copy_(summed.view_as(gradient))
        return values_V

    @torch.no_grad()
    def broadcast_weights(self, model: nn.Module) -> None:
        """Copy the weights and buffers of rank 0 to all ranks."""
        for tensor in (*model.parameters(), *model.buffers()):
            own = tensor.contiguous()
            with _reaching_others():
                distributed.broadcast(own, src=0, group=self._data)
            tensor.copy_(own)

    def shared_history(self, history: PredictionHistory) -> PredictionHistory:
        """Return a history whose files rank 0 alone reads and writes, for all ranks."""
        return _SharedHistory(history, self)

    def gather(self, rows_B: Tensor) -> Tensor:
        """The rows of all ranks, in order of rank. Gradients flow through it."""
        before, after = self.places(len(rows_B))
        padding = [rows_B.new_zeros(count, *rows_B.shape[1:]) for count in (before, after)]
        rows_N = torch.cat([padding[0], rows_B, padding[1]])
        summed_N: Tensor = _SumOverRanks.apply(rows_N, self)
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


class _SumOverRanks(torch.autograd.Function):
    """The sum over all ranks. Its gradient on each rank is that of all ranks' losses together.

    The clones are contiguous, because NCCL accepts no other tensors.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: JoinedRanks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum_over_ranks(values.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum_over_ranks(grad.clone(memory_format=torch.contiguous_format)), None


class _SharedHistory(PredictionHistory):
    """The predictions of all ranks. Rank 0 alone has the files."""

    def __init__(self, files: PredictionHistory, ranks: JoinedRanks) -> None:
        self._files, self._ranks = files, ranks

    def write(self, epoch: int, samples_B: Tensor, logits_BC: Tensor) -> None:
        """Store the logits of all ranks."""
        samples_N, logits_NC = self._ranks.gather(samples_B), self._ranks.gather(logits_BC)
        self._ranks.on_first(lambda: self._files.write(epoch, samples_N, logits_NC))

    def read(self, epoch: int, samples_B: Tensor) -> PastPredictions:
        """The predictions for the samples of this rank."""
        before, _ = self._ranks.places(len(samples_B))
        samples_N = self._ranks.gather(samples_B).cpu()
        past = self._ranks.on_first(lambda: self._files.read(epoch, samples_N))
        own = slice(before, before + len(samples_B))
        return PastPredictions(*(each[own].to(samples_B.device) for each in past))

    def sync(self) -> None:
        """Flush everything to disk."""
        self._ranks.on_first(self._files.sync)

    def prune(self, step: int, *, steps_per_epoch: int) -> None:
        """Remove the epochs that a run resumed at this step does not read."""
        self._ranks.on_first(lambda: self._files.prune(step, steps_per_epoch=steps_per_epoch))


@contextmanager
def join_ranks(device: torch.device, *, wait_s: float = 0.0) -> Iterator[Ranks]:
    """Join the other processes that torchrun started, if there are any.

    Args:
        device: device of the students of this process.
        wait_s: how long any rank may wait for its rows.

    Raises:
        WorkersError: a process ends or cannot be reached.
        ConfigError: the environment variables of torchrun are not complete, or some processes use
            a GPU and others a CPU.
    """
    rank, world = launched_rank()
    if world == 1:
        yield ONE_PROCESS
        return
    is_new, timeout_s = not distributed.is_initialized(), TIMEOUT_S + wait_s
    if is_new:
        timeout = timedelta(seconds=timeout_s)
        with _reaching_others():
            distributed.init_process_group(
                "gloo", store=_store(timeout), rank=rank, world_size=world, timeout=timeout
            )
    try:
        with _reaching_others():
            ranks = JoinedRanks(device, timeout_s)
        try:
            yield ranks
            # A process that ends makes torchrun stop the others, and rank 0 may still be writing.
            ranks.any(False)
        except StoppedTogether:
            ranks.any(False)
            raise
        finally:
            ranks.destroy_groups()
    finally:
        if is_new:
            distributed.destroy_process_group()


_CALLS = itertools.count()
"""Numbers the calls of `join_ranks`: torch uses the same keys of the store again for each."""


def _store(timeout: timedelta) -> Any:
    """Return a store with keys of this call alone, in which the ranks find each other.

    By default torchrun keeps one store when it starts the processes of a machine again, and the
    store has the addresses of those that ended. Between machines its rendezvous makes a new store,
    and the counts of restarts may differ.

    Raises:
        ConfigError: MASTER_ADDR or MASTER_PORT is missing or invalid.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not (address and port.isdecimal() and 0 < int(port) < 2**16):
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}, MASTER_ADDR={address} and MASTER_PORT={port} "
            "are set: several processes find each other at an address and a port of rank 0.",
            hint="torchrun sets all of them; unset WORLD_SIZE to train by one process.",
        )
    store, name = _underlying_store(), f"call-{next(_CALLS)}"
    store.set_timeout(timeout)
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        name = f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{name}"
    return distributed.PrefixStore(name, store)  # type: ignore[attr-defined]


@cache
def _underlying_store() -> Any:
    """Return the store of this process, which is kept open for as long as the process lives.

    Otherwise rank 0 would close its port and open it again between calls.
    """
    store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=TIMEOUT_S)))
    return store


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
