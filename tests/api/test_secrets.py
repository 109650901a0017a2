"""A token and a bucket's secret are used and never shown: not in logs, answers, errors, pickles."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from support.caches import make_spec, write_cache
from support.command import kd_cache
from support.serving import READ_TOKEN, TOKENS, serving_process
from support.sockets import connect, receive_all

from cache_service.errors import KdCacheError
from cache_service.rows.reader import open_cache
from cache_service.storage import open_storage

FORM = "application/x-www-form-urlencoded"
BUCKET_SECRET = "bucket-secret-canary-0123456789"
OTHER_TOKEN = "other-token-canary-0123456789"


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Everything that a server with secrets says: each answer, its log, its metrics."""
    folder = tmp_path_factory.mktemp("secrets")
    write_cache(str(folder / "root" / "toy"), make_spec())
    env = os.environ | {
        "AWS_SECRET_ACCESS_KEY": BUCKET_SECRET,
        "AWS_ACCESS_KEY_ID": "key-id-canary-0123456789",
        "KD_CACHE_TOKEN": OTHER_TOKEN,
    }
    log = folder / "log.txt"
    with serving_process(folder / "root", log=log, env=env, tokens=TOKENS) as server:
        answers = [
            server.ask(
                method,
                path,
                token=token,
                body=headers.get("body"),
                headers={name: value for name, value in headers.items() if name != "body"},
            )
            for method, path, token, headers in REQUESTS
        ]
        port = int(server.url.rpartition(":")[2])
        with connect(port) as opened:
            opened.sendall(f"GET /{READ_TOKEN} HTTP/9.9\r\nX: {READ_TOKEN}\r\n\r\n".encode())
            raw = receive_all(opened)
    texts = [bytes(each.data).decode(errors="replace") + str(each.headers) for each in answers]
    return {
        "statuses": [each.status for each in answers],
        "pages": "\n".join(text for text in texts if "text/html" in text),
        "answers": "\n".join([*texts, raw.decode(errors="replace")]),
        "log": log.read_text(),
    }


REQUESTS = [
    ("GET", "/v1/caches", READ_TOKEN, {}),
    ("GET", "/v1/caches/toy", READ_TOKEN, {}),
    ("GET", "/v1/caches/toy/rows?seed=0&start=0&stop=8", READ_TOKEN, {}),
    ("GET", "/metrics", READ_TOKEN, {}),
    ("GET", "/openapi.json", READ_TOKEN, {}),
    ("GET", "/v1/caches", OTHER_TOKEN, {}),
    ("GET", "/v1/caches", None, {"Authorization": f"Basic {OTHER_TOKEN}"}),
    ("GET", "/v1/caches", None, {"Cookie": f"kd_cache_token={OTHER_TOKEN}"}),
    ("GET", f"/v1/caches?token={READ_TOKEN}", None, {}),
    ("GET", f"/v1/caches/toy/rows?token={READ_TOKEN}&seed=0&start=0&stop=8", READ_TOKEN, {}),
    ("DELETE", f"/v1/caches/toy?token={READ_TOKEN}", READ_TOKEN, {}),
    ("POST", "/v1/builds", READ_TOKEN, {}),
    *[
        ("GET", path, token, {"Accept": "text/html"} | headers)
        for path in ("/", "/caches/toy", "/caches/toy/explore?seed=0&sample=1", "/caches/none")
        for token, headers in (
            (READ_TOKEN, {}),
            (None, {"Cookie": f"kd_cache_token={READ_TOKEN}"}),
            (None, {}),  # the form to sign in
            (OTHER_TOKEN, {}),
        )
    ],
    ("GET", f"/?token={READ_TOKEN}", None, {"Accept": "text/html"}),
    ("GET", "/static/page.js", READ_TOKEN, {}),
    ("POST", "/login", None, {"Content-Type": FORM, "body": f"token={OTHER_TOKEN}&next=%2F"}),
]


def test_the_requests_were_of_every_kind(said):
    assert {200, 401} <= set(said["statuses"])
    assert any(400 <= status < 500 and status != 401 for status in said["statuses"])


def test_every_page_was_among_the_answers(said):
    for heading in ("Caches", "toy", "seed", 'action="./login"'):
        assert heading in said["pages"], heading


@pytest.mark.parametrize("where", ["answers", "pages", "log"])
@pytest.mark.parametrize("secret", [READ_TOKEN, BUCKET_SECRET, OTHER_TOKEN, "key-id-canary"])
def test_no_secret_is_in_what_the_server_says(said, where, secret):
    assert len(said[where]) > 500
    assert secret not in said[where]


def test_the_log_still_says_what_happened(said):
    for part in ('"route": "/v1/caches/{name}/rows"', '"status": 401', '"request_id"'):
        assert part in said["log"]


def test_a_pickled_cache_of_a_bucket_holds_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", BUCKET_SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-id-canary")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    pickled = pickle.dumps(open_storage("s3://bucket/prefix"))
    assert BUCKET_SECRET.encode() not in pickled
    assert b"key-id-canary" not in pickled


def test_a_refusal_of_a_bucket_holds_no_secret(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", BUCKET_SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-id-canary")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(KdCacheError, match="bucket/prefix") as refused:
        open_cache("s3://bucket/prefix")
    assert "canary" not in str(refused.value)


def test_json_of_commands_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", BUCKET_SECRET)
    monkeypatch.setenv("KD_CACHE_TOKEN", OTHER_TOKEN)
    where = tmp_path / "toy"
    write_cache(str(where), make_spec())
    for words in (["info"], ["verify"]):
        ended = kd_cache(*words, str(where), "--json")
        assert ended.code == 0
        assert "canary" not in ended.out + ended.err
    assert all(b"canary" not in each.read_bytes() for each in Path(where).rglob("*.json"))
