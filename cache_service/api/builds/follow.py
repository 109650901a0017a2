"""Rows that a build has yet to record: their shards come first, and are awaited."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cache_service.api.builds.events import Stopping, on_thread
from cache_service.api.builds.supervisor import Builds
from cache_service.api.follow import Follow
from cache_service.errors import KdCacheError

LOG = logging.getLogger("kdcache.builds")


async def end_with(builds: Builds | None, stopping: Stopping) -> None:
    """Begin to end the workers when the server begins to stop, beside the requests in flight."""
    await stopping.wait()
    if builds is not None:
        builds.begin_to_stop()


class BuildFollow:
    """A `Follow` that also tells the queue what somebody waits for."""

    def __init__(self, builds: Builds, patient: Follow) -> None:
        self._builds = builds
        self._patient = patient

    async def await_shards(
        self, name: str, seed: int, shards: Sequence[int], wait_s: float
    ) -> bool:
        """See `Follow`. Who does not wait moves the shards forward, too: it will be back."""
        try:
            await on_thread(self._builds, self._builds.hurry, name, seed, shards)
        except KdCacheError as problem:  # the queue's trouble must not cost anybody rows
            LOG.warning("awaited shards of %s are not noted: %s", name, problem)
        return await self._patient.await_shards(name, seed, shards, wait_s)
