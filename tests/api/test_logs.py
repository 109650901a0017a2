"""Log lines are JSON, carry the request id, and hold nothing that a client or a bucket keeps."""

from __future__ import annotations

import io
import json
import logging

import pytest
import support.repeatable  # noqa: F401  loads the profile of the property tests
from fastapi import FastAPI
from starlette.testclient import TestClient

from cache_service.api.http.log import Redactor, RequestLogMiddleware, log_request, set_up_logs

KEPT = ("kdcache", "kdcache.requests", "uvicorn", "uvicorn.error")


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "bucket-canary-77")
    before = {n: logging.getLogger(n).__dict__.copy() for n in KEPT}
    text = io.StringIO()
    set_up_logs(text)
    yield text
    for name, attributes in before.items():
        logging.getLogger(name).__dict__.update(attributes)


@pytest.fixture
def client():
    app = FastAPI()
    app.add_middleware(RequestLogMiddleware, observers=(log_request,))

    @app.get("/caches/{name}")
    async def show(name: str) -> str:
        return name

    @app.get("/crash")
    async def crash() -> None:
        raise RuntimeError("bucket-canary-77 was used, Authorization: Bearer token-canary-1")

    return TestClient(app)


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_request_is_one_line_of_json(stream, client):
    client.get("/caches/toy", headers={"x-request-id": "job-7.step_3"})
    (line,) = lines(stream)
    assert line["time"].endswith("+00:00")
    del line["time"], line["seconds"]
    assert line == {
        "level": "info",
        "logger": "kdcache.requests",
        "message": "request",
        "request_id": "job-7.step_3",
        "method": "GET",
        "route": "/caches/{name}",
        "status": 200,
        "bytes": 5,
        "client": "testclient",
        "names": {"name": "toy"},
    }


def test_a_log_that_is_gone_stops_no_request(client):
    set_up_logs(BrokenStream())
    assert client.get("/caches/toy").status_code == 200


class BrokenStream(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_the_answer_carries_the_request_id_of_the_client(client):
    answer = client.get("/caches/toy", headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"


@pytest.mark.parametrize("wanted", ["", "a b", "a" * 65, "x\tb", 'x"}', "x;y"])
def test_an_id_that_could_forge_a_line_is_replaced(client, stream, wanted):
    answer = client.get("/caches/toy", headers={"x-request-id": wanted})
    assert len(answer.headers["x-request-id"]) == 16
    assert lines(stream)[0]["request_id"] == answer.headers["x-request-id"]


def test_two_requests_without_an_id_get_two(client):
    ids = {client.get("/caches/toy").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2


def test_queries_headers_and_unknown_paths_are_not_logged(stream, client):
    client.get("/caches/toy?token=canary-a", headers={"authorization": "Bearer canary-b"})
    client.get("/canary-c/x", headers={"cookie": "kd_cache_token=canary-d"})
    assert "canary" not in stream.getvalue()
    assert [line["route"] for line in lines(stream)] == ["/caches/{name}", "unmatched"]


def test_a_crash_is_a_problem_for_the_client_and_a_redacted_traceback_in_the_log(stream, client):
    answer = client.get("/crash", headers={"x-request-id": "c1"})
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "error"
    assert "c1" in answer.json()["hint"]
    assert "canary" not in answer.text
    crash, request = lines(stream)
    assert "RuntimeError: *** was used, Authorization: Bearer ***" in crash["exception"]
    assert crash["request_id"] == request["request_id"] == "c1"
    assert (request["level"], request["status"]) == ("error", 500)


def test_uvicorn_writes_the_same_kind_of_line_once(stream):
    logging.getLogger("uvicorn.error").warning("odd %s", "thing")
    (line,) = lines(stream)
    assert (line["logger"], line["level"], line["message"]) == (
        "uvicorn.error",
        "warning",
        "odd thing",
    )


def test_secrets_of_the_environment_are_told_by_their_names():
    redact = Redactor.of_environment(
        {
            "AWS_SECRET_ACCESS_KEY": "aaaaaaaa",
            "AWS_ACCESS_KEY_ID": "bbbbbbbb",
            "KD_CACHE_TOKEN": "cccccccc",
            "DB_PASSWORD": "dddddddd",
            "HOME": "/home/me",
            "SHORT_TOKEN": "abc",
        }
    )
    assert redact("aaaaaaaa bbbbbbbb cccccccc dddddddd /home/me abc") == (
        "*** *** *** *** /home/me abc"
    )


def test_a_secret_inside_another_is_gone_whole():
    assert Redactor(["canary", "canary-long"])("x canary-long y") == "x *** y"


def test_set_up_twice_still_writes_once(stream, client):
    set_up_logs(stream)
    client.get("/caches/toy")
    assert len(lines(stream)) == 1
