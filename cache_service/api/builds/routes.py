"""`/v1/builds`: request a recording, watch it, cancel it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from cache_service.api.builds.queue import Build, NoSuchBuildError
from cache_service.api.builds.request import BuildRequest
from cache_service.api.builds.space import OutOfSpace
from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.problems import responses
from cache_service.config import Frozen
from cache_service.errors import KdCacheError

router = APIRouter(prefix="/v1/builds", tags=["builds"])

MAX_LISTED = 1000

POLL_S = 0.3
"""How often an event stream asks the queue for a change, which another server may have made."""

RECONNECT_MS = 2000
"""How long a browser waits before it reconnects to a server that was restarted."""


class BuildsOffError(KdCacheError):
    """The server's configuration has no builds."""

    code = "builds_off"
    http_status = 404
    exit_code = 2


class BuildList(Frozen):
    """Builds, the newest first, and since when they lack space, if they do."""

    builds: tuple[Build, ...]
    out_of_space: OutOfSpace | None


def builds_of(request: Request) -> Builds:
    """The builds of the server. Raises BuildsOffError if its configuration has none."""
    builds: Builds | None = request.app.state.builds
    if builds is None:
        raise BuildsOffError(
            "this server runs no builds.",
            hint="Its operator can add `builds:` to its configuration.",
        )
    return builds


TheBuilds = Annotated[Builds, Depends(builds_of)]
BuildId = Annotated[str, Path(pattern="^[0-9a-f]{16}$", description="As in `id` of a build.")]


async def existing_build(builds: TheBuilds, build_id: BuildId) -> Build:
    """The build of the path. Raises NoSuchBuildError."""
    return await builds.on_thread(builds.queue.get, build_id)


ExistingBuild = Annotated[Build, Depends(existing_build)]


@router.post("", status_code=202, responses=responses(404, 409, 413, 429, 507))
async def submit(
    request: Request, requested: BuildRequest, builds: TheBuilds, response: Response
) -> Build:
    """Queue a build, which creates a cache, or extends or finishes an existing one.

    While an equal build waits or runs, that build is returned, with the higher priority of the two.
    Once it has ended, the same request makes a new build, which resumes.
    """
    build = await builds.on_thread(builds.submit, requested)
    response.headers["location"] = f"{request.scope['root_path']}{router.prefix}/{build.id}"
    return build


@router.get("", responses=responses(404))
async def list_builds(
    builds: TheBuilds, limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 100
) -> BuildList:
    """Builds, the newest first."""
    newest = await builds.on_thread(builds.queue.newest, limit=limit)
    shortage = await builds.on_thread(builds.out_of_space)
    return BuildList(builds=tuple(newest), out_of_space=shortage)


@router.get("/{build_id}", responses=responses(404))
async def show_build(build: ExistingBuild) -> Build:
    """A build as it is now."""
    return build


@router.delete(
    "/{build_id}",
    responses={**responses(404, 507), 202: {"model": Build, "description": "It is ending."}},
)
async def cancel(build: ExistingBuild, builds: TheBuilds, response: Response) -> Build:
    """Cancel a build. What is recorded stays. A build that has ended does not change.

    A running build finishes the shard that it is writing. The status is 202, and `canceling` is
    true, until it has ended.
    """
    canceled = await builds.on_thread(builds.cancel, build.id)
    response.status_code = 200 if canceled.is_final else 202
    return canceled


@router.get("/{build_id}/events", response_class=EventSourceResponse, responses=responses(404))
async def events(
    build: ExistingBuild, builds: TheBuilds, request: Request
) -> AsyncIterator[ServerSentEvent]:
    """The build as it is, then every change, as server-sent events named `build`.

    The stream ends with the build, or when the server stops: reconnect then. `Last-Event-ID` is not
    needed, because every event holds the whole build.
    """
    stopping: asyncio.Event = request.app.state.service.stopping
    if request.method == "HEAD":
        return
    sent_version = 0
    with suppress(NoSuchBuildError):  # the server may drop old builds
        while not stopping.is_set():
            current = await builds.on_thread(builds.queue.get, build.id)
            if current.version != sent_version:
                sent_version = current.version
                yield ServerSentEvent(
                    event="build", id=str(sent_version), retry=RECONNECT_MS, data=current
                )
            if current.is_final:
                return
            with anyio.move_on_after(POLL_S):
                await stopping.wait()
