"""Run a cycle: train, choose, record, and again. Every stage resumes, so the whole does."""

from __future__ import annotations

import json
from collections.abc import Mapping

from cache_service.errors import NonFiniteError
from cache_service.storage.local import LocalStorage
from cli.experiments.cycle.check import check_cycle
from cli.experiments.cycle.config import CycleConfig
from cli.experiments.cycle.rounds import Plan, Round, Source
from cli.experiments.cycle.table import CycleTable, RoundScore, StudentScore
from cli.experiments.reproduce.cohort import Outcome, train_cohort
from cli.experiments.reproduce.order import Say
from cli.experiments.reproduce.runs import record_teacher

PAGE_NAME = "cycle.md"
JSON_NAME = "cycle.json"


def run_cycle(config: CycleConfig, *, where: str, say: Say, resident: bool = False) -> CycleTable:
    """Run the rounds that are not done yet; what is done is kept. Writes the table each round.

    Args:
        config: the cycle file.
        where: its name, for messages.
        say: told what is going on, in sentences.
        resident: keep the images on the device where that can be.

    Raises:
        NonFiniteError: no student of a round was trained.
        KeyboardInterrupt: stopped; the same call goes on from there.
        KdCacheError: see the message; what is wrong with the file is said before any training.
    """
    plan = Plan(config, where)
    check_cycle(plan)
    sources, recorded = plan.first_sources(), list[Source]()
    table = CycleTable(out=config.out, rounds=())
    for number in range(1, config.rounds + 1):
        round_ = plan.make_round(number, sources)
        for source in round_.sources:
            if source.build is not None and source not in recorded:
                record_teacher(source.build, title=f"recording {source.name}", say=say)
                recorded.append(source)
        configs = {label: plan.train_config(round_, label) for label in round_.students}
        title = f"round {number}"
        outcomes = train_cohort(configs, title=title, say=say, resident=resident)
        table = CycleTable(out=config.out, rounds=(*table.rounds, _score(round_, outcomes)))
        _write(config.out, table)
        chosen = table.rounds[-1].chosen
        if chosen is None:
            reasons = "; ".join(f"{name}: {each.failure}" for name, each in outcomes.items())
            raise NonFiniteError(f"no student of round {number} was trained: {reasons}")
        sources = (*sources, plan.next_source(number, chosen.method))
    return table


def read_cycle(out: str) -> CycleTable:
    """The table that a cycle has written so far; empty where it has written none."""
    content = LocalStorage(out).get(JSON_NAME)
    if content is None:
        return CycleTable(out=out, rounds=())
    return CycleTable.model_validate_json(content)


def _score(round_: Round, outcomes: Mapping[str, Outcome]) -> RoundScore:
    scores = {name: outcome.history.last for name, outcome in outcomes.items() if outcome.history}
    top1 = {name: last.top1 for name, last in scores.items() if last is not None}
    chosen = max(top1, key=lambda name: top1[name], default=None)  # the first of equals
    return RoundScore(
        round=round_.number,
        teachers=tuple(source.name for source in round_.sources),
        students=tuple(
            _student(name, outcome, chosen=name == chosen) for name, outcome in outcomes.items()
        ),
    )


def _student(name: str, outcome: Outcome, *, chosen: bool) -> StudentScore:
    out, history = outcome.config.out, outcome.history
    if history is None or history.last is None or history.best is None:
        return StudentScore(method=name, out=out, failure=outcome.failure)
    return StudentScore(
        method=name,
        out=out,
        top1=history.last.top1,
        top5=history.last.top5,
        best_top1=history.best.top1,
        best_epoch=history.best_epoch,
        chosen=chosen,
    )


def _write(out: str, table: CycleTable) -> None:
    storage = LocalStorage(out)
    storage.put(PAGE_NAME, table.page().encode())
    document = json.dumps(table.model_dump(mode="json"), indent=2, allow_nan=False)
    storage.put(JSON_NAME, f"{document}\n".encode())
    storage.sweep()
