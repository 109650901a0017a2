"""`/v1/builds`: ask for a recording, watch it, cancel it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from cache_service.api.builds.errors import BuildsOffError
from cache_service.api.builds.events import build_events, on_thread
from cache_service.api.builds.request import BuildRequest
from cache_service.api.builds.states import Build
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.problems import responses
from cache_service.format.frozen import Frozen

router = APIRouter(prefix="/v1/builds", tags=["builds"])

MOST_LISTED = 1000


class BuildList(Frozen):
    """Builds, the newest first."""

    builds: tuple[Build, ...]


def builds_of(request: Request) -> Builds:
    """The builds of the server. Raises BuildsOffError where its configuration has none."""
    builds: Builds | None = request.app.state.builds
    if builds is None:
        raise BuildsOffError(
            "this server runs no builds.", hint="Its operator adds `builds:` to its configuration."
        )
    return builds


BuildsHere = Annotated[Builds, Depends(builds_of)]
BuildId = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="As in `id` of a build.")]


async def known_build(builds: BuildsHere, build_id: BuildId) -> Build:
    """The build of the path. Raises NoSuchBuildError."""
    return await on_thread(builds, builds.get, build_id)


KnownBuild = Annotated[Build, Depends(known_build)]


@router.post("", status_code=202, responses=responses(404, 409, 413, 429, 507))
async def submit(wanted: BuildRequest, builds: BuildsHere, response: Response) -> Build:
    """Queue a build. It extends or finishes a cache that is there, and always resumes.

    The same request, while its build waits or runs, is answered with that build; a larger priority
    is taken over. Once a build has ended, the same request makes a new one.
    """
    build = await on_thread(builds, builds.submit, wanted)
    response.headers["location"] = f"{router.prefix}/{build.id}"
    return build


@router.get("", responses=responses(404))
async def listed(
    builds: BuildsHere, limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 100
) -> BuildList:
    """Builds, the newest first."""
    return BuildList(builds=tuple(await on_thread(builds, builds.list, limit)))


@router.get("/{build_id}", responses=responses(404))
async def one(build: KnownBuild) -> Build:
    """A build as it is now."""
    return build


@router.delete(
    "/{build_id}",
    responses={**responses(404, 507), 202: {"model": Build, "description": "It is ending."}},
)
async def cancel(build: KnownBuild, builds: BuildsHere, response: Response) -> Build:
    """Cancel a build. What is recorded stays; a build that has ended is left as it is.

    A running build finishes the shard that it is writing: 202, and `canceling` until then.
    """
    canceled = await on_thread(builds, builds.cancel, build.id)
    response.status_code = 200 if canceled.is_final else 202
    return canceled


@router.get("/{build_id}/events", response_class=EventSourceResponse, responses=responses(404))
async def events(
    build: KnownBuild, builds: BuildsHere, request: Request
) -> AsyncIterator[ServerSentEvent]:
    """The build as it is, then every change, as server-sent events named `build`.

    Ends with the build, or with the server: reconnect then. `Last-Event-ID` is not needed, since
    the first event always says everything.
    """
    stopping: Any = request.app.state.service.stopping
    async for event in build_events(builds, build.id, stopping):
        yield event
