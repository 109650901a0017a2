"""Is a loss from the cache the loss with the live teacher? Asked at the same weights, step by step.

Two whole trainings cannot answer it: two that differ in the last bit of one number drift apart, as
all training does. So here each step is taken twice from one state, once with either teacher.
"""

from __future__ import annotations

import copy
from itertools import islice

from cli.experiments.demo.result import Agreement
from cli.experiments.demo.way import WayJob, live_teacher
from distill.config import TrainConfig
from distill.finite import FiniteWatch
from distill.optim import set_learning_rate
from distill.randomness import private_random
from distill.schedule import learning_rate
from distill.step import TrainContext, train_step
from distill.stream import LiveStream, open_stream
from distill.student_state import make_student_state
from distill.students import choose_device

TOLERANCE = 1e-3
"""Nats by which a loss may move when the teacher's logits are rounded to float16."""


def compare_steps(cached: TrainConfig, live: WayJob) -> Agreement:
    """Losses of the first epoch, with either teacher, along the path of the cached training.

    Args:
        cached: train file of the run from the cache.
        live: the same run without caches, and who answers in it.
    """
    device = choose_device(cached.device)
    recorded = open_stream(cached, device=device)
    assert live.teacher is not None
    teacher = live_teacher(live.teacher, live.train, device)
    beside = LiveStream(open_stream(live.train, device=device), [teacher])
    watch = FiniteWatch(device)
    from_cache, from_live = (
        TrainContext(recorded, device, watch),
        TrainContext(beside, device, watch),
    )
    num_steps = recorded.facts.plan.steps_per_epoch
    losses: list[tuple[float, float]] = []
    with private_random(device):
        student = make_student_state(cached, recorded, device)
        for batch in islice(recorded.batches(0), num_steps):
            rate = learning_rate(
                cached.schedule,
                batch.cursor.step,
                peak=cached.optimizer.lr,
                updates_per_epoch=num_steps,
                epochs=cached.epochs,
            )
            set_learning_rate(student.optimizer, rate)
            twin = copy.deepcopy(student)
            (with_live,) = train_step(from_live, [twin], [batch])
            (with_cache,) = train_step(from_cache, [student], [batch])
            losses.append((with_live.floats()["loss"], with_cache.floats()["loss"]))
    live_losses, cached_losses = zip(*losses, strict=True)
    return Agreement(live_losses, cached_losses, TOLERANCE)
