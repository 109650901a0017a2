"""Where a run stands, kept and restored."""

from __future__ import annotations

import pytest
import torch

from distill.reporting import EpochTotals, Named, name_values
from distill.scores import Evaluation
from distill.students import History

CPU = torch.device("cpu")


def scores(top1):
    return Evaluation(10, top1, 1.0, 0.5, 0.1, None)


def test_the_best_is_the_first_of_the_highest_and_the_last_is_the_last():
    history = History()
    for epoch, top1 in enumerate([0.2, 0.6, 0.4, 0.6], start=1):
        history.note(scores(top1), epoch)
    assert (history.best.top1, history.best_epoch, history.last.top1) == (0.6, 2, 0.6)


def test_it_comes_back_from_its_state():
    history = History(step=7)
    history.note(scores(0.5), 1)
    history.totals.add(name_values({"loss": torch.tensor(2.0)}), 4)
    again = History()
    again.restore(history.state(), CPU)
    assert (again.step, again.last, again.best) == (7, scores(0.5), scores(0.5))
    assert again.totals.means() == {"loss": 2.0}
    fresh = History()
    fresh.restore(History().state(), CPU)
    assert fresh.last is None
    assert fresh.totals.means() == {}


def test_means_are_weighted_by_views():
    totals = EpochTotals()
    totals.add(Named(("a", "b"), torch.tensor([1.0, 10.0])), 3)
    totals.add(Named(("a", "b"), torch.tensor([5.0, 20.0])), 1)
    assert totals.means() == pytest.approx({"a": 2.0, "b": 12.5})
    totals.clear()
    assert totals.means() == {}
