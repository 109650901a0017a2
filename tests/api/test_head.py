"""HEAD wherever GET is: the same status and headers, no body, and no stream that stays open."""

from __future__ import annotations

import json
import re

import pytest
from support.build_queue import builds_document, request_document
from support.caches import make_spec, write_cache
from support.serving import READ_TOKEN, TOKENS, serving

from cache_service.api.page import routes as page_routes
from docs.service import openapi

VARYING = {"date", "x-request-id", "transfer-encoding", "content-length"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    write_cache(str(root / "c"), make_spec(), range(1))
    with serving(root, builds=builds_document(devices=["cpu"])) as running:
        yield running


@pytest.fixture(scope="module")
def build_id(server):
    return server.ask("POST", "/v1/builds", json=request_document(teacher="lost")).json()["id"]


def paths():
    document = openapi()["paths"]
    described = [path for path, methods in document.items() if "get" in methods]
    ends = ("/v1/events", "/find")  # a stream, and redirections
    pages = [r.path for r in page_routes.router.routes if not r.path.endswith(ends)]
    return [*described, *pages, "/openapi.json"]


@pytest.mark.parametrize("path", paths())
def test_head_answers_what_get_answers_without_the_body(server, build_id, path):
    values = {"name": "page.css" if "static" in path else "c", "build_id": build_id}
    asked = re.sub(r"\{(\w+)(:path)?\}", lambda m: values.get(m[1], "logits/zarr.json"), path)
    if path.endswith("/rows"):
        asked += "?seed=0&start=0&stop=4"
    head, whole = server.ask("HEAD", asked), server.ask("GET", asked)
    assert (head.status, head.data) == (whole.status, b"")
    assert whole.status == 200 or path.endswith("/explore")  # this cache has no real images
    named = [{k.lower() for k in each.headers} - VARYING for each in (head, whole)]
    assert named[0] == named[1]
    assert head.headers["content-type"] == whole.headers["content-type"]


def test_the_head_of_a_stream_ends_and_holds_no_slot(server):
    answer = server.ask("HEAD", "/v1/events")
    assert (answer.status, answer.data) == (200, b"")
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "kdcache_event_streams 0.0" in server.ask("GET", "/metrics").data.decode()


def test_head_is_not_described_beside_get():
    assert all("head" not in methods for methods in openapi()["paths"].values())


def test_the_log_names_the_token_of_a_request_and_never_the_token(tmp_path, caplog):
    with (
        caplog.at_level("INFO", logger="kdcache.requests"),
        serving(tmp_path, tokens=TOKENS) as server,
    ):
        server.ask("GET", "/v1/caches", token=READ_TOKEN)
        server.ask("GET", "/v1/caches", token="wrong")
        server.ask("POST", "/v1/builds", token=READ_TOKEN)
        server.ask("GET", "/healthz")
    lines = [each.fields for each in caplog.records if each.name == "kdcache.requests"]
    assert [line.get("token") for line in lines] == ["reader", None, "reader", None]
    assert READ_TOKEN not in json.dumps(lines)
