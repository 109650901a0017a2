"""What came of the rounds of a cycle, as JSON and as a page. No clock is in it: a cycle that was
killed and resumed ends with the same bytes."""

from __future__ import annotations

from cache_service.format.frozen import Frozen
from cli.experiments.reproduce.markdown import grid

TITLE = "# Learning cycle"


class StudentScore(Frozen):
    """One student of a round.

    Attributes:
        method: its name in the cycle.
        out: folder of its run.
        top1, top5: shares of the evaluation set, after the last epoch.
        best_top1, best_epoch: of its best epoch; chosen on the evaluation set, so it flatters.
        chosen: it goes on as a teacher.
        failure: what stopped it.
    """

    method: str
    out: str
    top1: float | None = None
    top5: float | None = None
    best_top1: float | None = None
    best_epoch: int | None = None
    chosen: bool = False
    failure: str | None = None


class RoundScore(Frozen):
    """One round: who taught, and how good the students became."""

    round: int
    teachers: tuple[str, ...]
    students: tuple[StudentScore, ...]

    @property
    def chosen(self) -> StudentScore | None:
        """The student that goes on."""
        return next((student for student in self.students if student.chosen), None)


class CycleTable(Frozen):
    """All rounds so far."""

    out: str
    rounds: tuple[RoundScore, ...]

    def page(self) -> str:
        """As Markdown."""
        header = ("round", "teachers", "", "method", "top-1", "top-5", "best top-1", "goes on")
        rows = [_row(each, student) for each in self.rounds for student in each.students]
        several = any(len(each.students) > 1 for each in self.rounds)
        lines = [TITLE, "", *grid(header, rows), ""]
        if several:
            lines += ["The student that goes on is chosen on the evaluation set: it flatters.", ""]
        return "\n".join(lines)


def _row(each: RoundScore, student: StudentScore) -> tuple[str, ...]:
    taught = (str(each.round), str(len(each.teachers)), ", ".join(each.teachers), student.method)
    if student.failure is not None:
        return (*taught, f"failed: {student.failure}", "", "", "")
    best = f"{_percent(student.best_top1)} at epoch {student.best_epoch}"
    scores = (_percent(student.top1), _percent(student.top5), best)
    return (*taught, *scores, "yes" if student.chosen else "")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
