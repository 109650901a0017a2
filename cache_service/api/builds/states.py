"""One build of the queue, as it is stored and as clients see it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cache_service.api.builds.request import BuildRequest
from cache_service.errors import KdCacheError
from cache_service.format.frozen import Frozen

State = Literal["queued", "running", "done", "failed", "canceled"]

FINAL: tuple[State, ...] = ("done", "failed", "canceled")
"""States that a build does not leave. The same request again makes another build, which resumes."""


class BuildProgress(Frozen):
    """How far a build is; see `cache_service.recording.progress.Progress`."""

    rows_done: Annotated[int, Field(description="Recorded, by this run and those before.")]
    rows_total: int
    shards_done: int
    shards_total: int
    shards_committed: Annotated[int, Field(description="By this run.")]
    bytes_written: Annotated[int, Field(description="By this run, uncompressed.")]
    rows_per_s: Annotated[float, Field(description="Answered by the teacher in this run.")]
    eta_s: Annotated[float | None, Field(description="Seconds left at the present rate.")]


class BuildError(Frozen):
    """Why a build failed: the error that `kd-cache build` would have shown."""

    code: str
    status: Annotated[int, Field(description="HTTP status of the code.")]
    detail: str
    hint: str

    @classmethod
    def of(cls, refusal: KdCacheError) -> BuildError:
        """The same words."""
        return cls(
            code=refusal.code,
            status=refusal.http_status,
            detail=refusal.message,
            hint=refusal.hint,
        )


class Build(Frozen):
    """A build of the queue. Times are Unix times in seconds."""

    id: str
    state: State
    cache: str
    teacher: str
    dataset: str
    seeds: Annotated[str, Field(description="As people write them, such as 0:8, 12:13.")]
    priority: int
    canceling: Annotated[bool, Field(description="Told to end; the shard at hand is finished.")]
    device: Annotated[str | None, Field(description="Where it runs or ran last.")]
    request: BuildRequest
    progress: BuildProgress | None
    error: BuildError | None
    created_s: float
    started_s: float | None
    finished_s: float | None
    version: Annotated[int, Field(description="Counts the changes of this build.")]

    @property
    def is_final(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in FINAL
