"""Losses that are no numbers, looked at once or in bulk."""

from __future__ import annotations

import pytest
import torch

from cache_service.errors import NonFiniteError
from distill.batches import Cursor
from distill.finite import MAX_PENDING, NonFiniteCheck, refuse_non_finite_weights
from distill.reporting import name_values

SAMPLES = torch.arange(100, 104)


def see(watch, step, loss=1.0, soft=0.5):
    values = {"loss": torch.tensor(loss), "loss_soft": torch.tensor(soft)}
    watch.add(Cursor(step, 2, 7, 40, 44), SAMPLES, name_values(values))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_on_a_cpu_a_bad_loss_is_refused_at_once(bad):
    watch = NonFiniteCheck(torch.device("cpu"))
    see(watch, 11)
    says = (
        rf"loss of step 12 is not finite \(loss=1, loss_soft={bad:g}\); epoch 2, seed 7, positions "
        r"\[40, 44\), samples 100, 101, 102, 103\."
    )
    with pytest.raises(NonFiniteError, match=says):
        see(watch, 12, soft=bad)


def waiting_watch():
    """A watch that behaves as on a GPU, where looking is dear."""
    return NonFiniteCheck(torch.device("cuda"))


def test_on_a_gpu_the_first_bad_step_is_named_when_somebody_looks():
    watch = waiting_watch()
    for step in range(10):
        see(watch, step, loss=float("nan") if step >= 4 else 1.0)
    with pytest.raises(NonFiniteError, match="loss of step 4 is not finite"):
        watch.check()
    watch.check()  # what was told is not told again


def test_on_a_gpu_looking_is_put_off_but_not_for_ever():
    watch = waiting_watch()
    see(watch, 0, loss=float("nan"))
    for step in range(1, MAX_PENDING - 1):
        see(watch, step)
    with pytest.raises(NonFiniteError, match="step 0 "):
        see(watch, MAX_PENDING - 1)


def test_a_long_list_of_samples_is_cut():
    watch = NonFiniteCheck(torch.device("cpu"))
    values = name_values({"loss": torch.tensor(float("nan"))})
    with pytest.raises(NonFiniteError, match=r"samples 0, 1, .*, 15 and 984 more\."):
        watch.add(Cursor(0, 0, 0, 0, 1000), torch.arange(1000), values)


def test_spoiled_weights_are_named():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    refuse_non_finite_weights(model, 3)
    with torch.no_grad():
        model[1].bias[0] = float("inf")
    says = r"weights of the student are not finite after step 3 \(first in 1\.bias\)"
    with pytest.raises(NonFiniteError, match=says):
        refuse_non_finite_weights(model, 3)
    with pytest.raises(NonFiniteError, match="weights of student b are not finite after step 3"):
        refuse_non_finite_weights(model, 3, student="b")


def test_of_several_students_the_first_bad_one_is_named_whatever_each_reports():
    watch = waiting_watch()
    cursor = Cursor(5, 2, 7, 40, 44)
    for student, numbers in (("a", {"loss": 1.0}), ("b", {"logits": float("nan"), "top1": 0.5})):
        values = name_values({name: torch.tensor(value) for name, value in numbers.items()})
        watch.add(cursor, SAMPLES, values, student=student)
    see(watch, 5, loss=float("nan"))
    says = r"loss of student b at step 5 is not finite \(logits=nan\)"
    with pytest.raises(NonFiniteError, match=says):
        watch.check()
