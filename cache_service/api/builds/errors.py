"""What only the queue of builds refuses."""

from __future__ import annotations

from cache_service.errors import KdCacheError


class NoSuchBuildError(KdCacheError):
    """No build of this server has that id."""

    code = "no_such_build"
    http_status = 404
    exit_code = 2


class QueueFullError(KdCacheError):
    """As many builds wait as the server's configuration allows."""

    code = "queue_full"
    http_status = 429
    exit_code = 4
    retry_after_s = 30


class BuildsOffError(KdCacheError):
    """The server's configuration has no builds."""

    code = "builds_off"
    http_status = 404
    exit_code = 2
