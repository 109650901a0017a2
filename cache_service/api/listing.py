"""A listing of a cache's nodes, for Zarr readers that want one: PROPFIND, as obstore asks.

It names groups and arrays, not chunks: a reader finds those by the array's own grid. Paths are
relative to the cache's address, because obstore 0.12 takes them so (WebDAV's are the server's).
Source: RFC 4918, section 9.1.
"""

from __future__ import annotations

from urllib.parse import quote
from xml.sax.saxutils import escape

from fastapi import APIRouter, Request
from fastapi.responses import Response

from cache_service.api.objects import NoSuchKeyError, documents_of
from cache_service.api.service import TheService

router = APIRouter(include_in_schema=False)

NO_DATE = "Thu, 01 Jan 1970 00:00:00 GMT"
"""Nothing stored holds a date, and a reader of listings wants one."""


@router.api_route("/v1/caches/{name}/zarr/{key:path}", methods=["PROPFIND"])
@router.api_route("/v1/caches/{name}/zarr", methods=["PROPFIND"])
async def listing(request: Request, service: TheService, name: str, key: str = "") -> Response:
    """The nodes at and below a key: one level of them, or all with `Depth: infinity`."""
    prefix = f"{key.strip('/')}/" if key.strip("/") else ""

    def sizes() -> dict[str, int]:
        served = service.catalog.open(name)
        storage = served.cache.storage
        return {
            each: storage.size(each) or 0
            for each in sorted(documents_of(served.cache.spec))
            if each.startswith(prefix)
        }

    found = await service.gate.read(request, sizes)
    if not found:
        raise NoSuchKeyError(f"no cache has keys below {key[:200]!r}.")
    deep = request.headers.get("depth", "infinity") not in ("0", "1")
    entries = [_entry(f"/{prefix}", None)]
    folders = set()
    for each, size in found.items():
        folder, nested, _ = each.removeprefix(prefix).partition("/")
        if deep or not nested:
            entries.append(_entry(f"/{each}", size))
        elif folder not in folders:
            folders.add(folder)
            entries.append(_entry(f"/{prefix}{folder}/", None))
    body = f'<?xml version="1.0"?><D:multistatus xmlns:D="DAV:">{"".join(entries)}</D:multistatus>'
    return Response(body, 207, media_type="application/xml")


def _entry(path: str, size: int | None) -> str:
    kind = "<D:collection/>" if size is None else ""
    length = "" if size is None else f"<D:getcontentlength>{size}</D:getcontentlength>"
    return (
        f"<D:response><D:href>{escape(quote(path))}</D:href><D:propstat><D:prop>"
        f"<D:getlastmodified>{NO_DATE}</D:getlastmodified>{length}"
        f"<D:resourcetype>{kind}</D:resourcetype></D:prop>"
        "<D:status>HTTP/1.1 200 OK</D:status></D:propstat></D:response>"
    )
