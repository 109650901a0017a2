"""Ranges of recorded positions over HTTP: the bytes of the local path, or a refusal."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
import safetensors.numpy
from support.asgi import ask
from support.caches import make_rows, make_spec, open_writer, write_cache, write_shard
from support.serving import READ_TOKEN, TOKENS, serving

from cache_service.api.app import create_app
from cache_service.api.http.catalog import OpenCache
from cache_service.api.http.limits import COPIED_BYTES
from cache_service.api.http.settings import ServeConfig, ServiceLimits
from cache_service.format.frame import CHECKSUM_HEADER, MEDIA_TYPE, checksum_of
from cache_service.rows.reader import Cache, open_cache

PROBLEM = "application/problem+json"


def told(answer):
    assert answer.headers["content-type"] == PROBLEM
    problem = json.loads(answer.data)
    assert problem["status"] == answer.status
    assert {"type", "title", "detail", "instance", "code", "hint"} <= set(problem)
    return problem


@pytest.mark.parametrize("name", ["dense", "features", "zstd"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 100), (7, 9), (30, 35), (95, 100)])
def test_a_range_has_the_bytes_of_the_local_path(server, root, name, start, stop):
    path = f"/v1/caches/{name}/rows?seed=0&start={start}&stop={stop}"
    for _ in range(2):  # from storage, and when they are ready
        answer = server.ask("GET", path)
        assert answer.status == 200
        assert answer.headers["content-type"] == MEDIA_TYPE
        assert answer.headers[CHECKSUM_HEADER] == checksum_of(answer.data)
        found = safetensors.numpy.load(answer.data)
        wanted = open_cache(str(root / name)).read(0, start, stop)
        assert set(found) == set(wanted)
        for array, values in wanted.items():
            assert found[array].tobytes() == values.tobytes()
            assert found[array].shape == values.shape


def test_arrays_come_in_the_order_of_the_cache_whatever_the_order_asked(server):
    path = "/v1/caches/dense/rows?seed=1&start=3&stop=9&arrays="
    one, other = (server.ask("GET", path + names) for names in ("sample,logits", "logits,sample"))
    assert one.data == other.data
    assert one.headers["etag"] == other.headers["etag"]
    assert set(safetensors.numpy.load(one.data)) == {"sample", "logits"}


def test_an_answer_that_is_known_is_not_sent_again(server):
    path = "/v1/caches/dense/rows?seed=0&start=0&stop=4"
    assert server.ask("GET", path).headers["cache-control"] == "no-cache"
    path += f"&fingerprint={make_spec().fingerprint}"
    first = server.ask("GET", path)
    etag = first.headers["etag"]
    assert "immutable" in first.headers["cache-control"]
    assert "public" in first.headers["cache-control"]
    again = server.ask("GET", path, headers={"If-None-Match": f'"x", {etag}'})
    assert (again.status, again.data, again.headers["etag"]) == (304, b"", etag)
    other = server.ask("GET", path + "&arrays=sample")
    assert other.headers["etag"] != etag


def test_head_says_what_get_would(server):
    path = "/v1/caches/dense/rows?seed=0&start=0&stop=4"
    head, whole = server.ask("HEAD", path), server.ask("GET", path)
    assert head.data == b""
    for name in ("content-length", "etag", CHECKSUM_HEADER, "content-type"):
        assert head.headers[name] == whole.headers[name]


def test_json_is_for_eyes(server, root):
    path = "/v1/caches/dense/rows?seed=0&start=2&stop=4"
    answer = server.ask("GET", path, headers={"Accept": "application/json"})
    shown = json.loads(answer.data)
    rows = open_cache(str(root / "dense")).read(0, 2, 4)
    assert shown["arrays"]["sample"] == rows["sample"].tolist()
    assert [shown[name] for name in ("seed", "start", "stop")] == [0, 2, 4]
    for name in ("digest", "origin"):  # beyond 2**53 most JSON readers round
        assert shown["arrays"][name] == [str(value) for value in rows[name].tolist()]
    np.testing.assert_array_equal(np.float16(shown["arrays"]["logits"]), rows["logits"])
    many = server.ask(
        "GET",
        "/v1/caches/dense/rows?seed=0&start=0&stop=65",
        headers={"Accept": "application/json"},
    )
    assert (many.status, told(many)["code"]) == (422, "request")


@pytest.mark.parametrize(
    ("query", "status", "code"),
    [
        ("seed=0&start=0", 422, "request"),
        ("seed=0&start=4&stop=4", 422, "request"),
        ("seed=0&start=5&stop=4", 422, "request"),
        ("seed=-1&start=0&stop=4", 422, "request"),
        ("seed=0&start=-1&stop=4", 422, "request"),
        ("seed=9223372036854775808&start=0&stop=4", 422, "request"),
        ("seed=0&start=0&stop=99999999999999999999", 422, "request"),
        ("seed=0&start=0&stop=2147483647", 413, "too_large"),
        ("seed=0&start=0&stop=4&arrays=nothing", 422, "request"),
        ("seed=0&start=0&stop=4&arrays=", 422, "request"),
        ("seed=0&start=0&stop=4&wait=nan", 422, "request"),
        ("seed=0&start=0&stop=4&wait=-1", 422, "request"),
        ("seed=0&start=0&stop=4&strt=1", 422, "request"),
        ("seed=0&seed=1&start=0&stop=4", 422, "request"),
        ("&".join(f"a{i}=1" for i in range(40)), 422, "request"),
        ("seed=0&start=0&stop=101", 404, "rows_not_built"),
        ("seed=7&start=0&stop=4", 404, "rows_not_built"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_a_reason(server, query, status, code):
    answer = server.ask("GET", f"/v1/caches/dense/rows?{query}")
    assert (answer.status, told(answer)["code"]) == (status, code)
    if status == 422:
        assert told(answer)["detail"].endswith(".")
        assert told(answer)["hint"].endswith(".")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("seed=0&start=0", "`stop` in the query is missing."),
        ("seed=0&start=0&stop=4&strt=1", "`strt` in the query is not known here."),
        (
            "seed=-1&start=0&stop=4",
            '`seed` in the query should be greater than or equal to 0, and is "-1".',
        ),
    ],
)
def test_a_field_that_is_wrong_is_named_in_a_sentence(server, query, says):
    problem = told(server.ask("GET", f"/v1/caches/dense/rows?{query}"))
    assert problem["detail"] == f"This request is refused: {says}"
    assert problem["hint"] == "GET /openapi.json describes every field of this request."


def test_no_answer_names_a_path_of_the_server(server, root):
    for name, query in (("dense", "seed=7&start=0&stop=4"), ("half", "seed=0&start=32&stop=64")):
        answer = server.ask("GET", f"/v1/caches/{name}/rows?{query}")
        assert str(root) not in answer.data.decode()


def test_a_cache_that_is_not_there_is_404(server):
    for name in ("nothing", "stray.txt", ".hidden", "x" * 200, "linked"):
        answer = server.ask("GET", f"/v1/caches/{name}/rows?seed=0&start=0&stop=4")
        assert (answer.status, told(answer)["code"]) == (404, "not_a_cache")


def test_planned_rows_are_to_be_asked_for_again(server):
    for query in ("seed=0&start=32&stop=64", "seed=1&start=0&stop=4", "seed=0&start=0&stop=100"):
        answer = server.ask("GET", f"/v1/caches/half/rows?{query}")
        assert (answer.status, told(answer)["code"]) == (503, "rows_not_built")
        assert int(answer.headers["retry-after"]) >= 1
    assert server.ask("GET", "/v1/caches/half/rows?seed=0&start=0&stop=32").status == 200


def test_a_request_that_waits_gets_the_rows_when_they_are_recorded(tmp_path):
    spec = make_spec()
    writer = open_writer(str(tmp_path / "growing"), spec, 1)
    rows = make_rows(spec, 0)
    with serving(tmp_path) as server:
        path = "/v1/caches/growing/rows?seed=0&start=0&stop=4"
        begun = time.monotonic()
        assert server.ask("GET", path + "&wait=0.2").status == 503
        assert time.monotonic() - begun >= 0.2
        timer = threading.Timer(0.3, write_shard, (writer, 0, 0), {"rows": rows})
        timer.start()
        answer = server.ask("GET", path + "&wait=20")
        timer.join()
        assert answer.status == 200
        assert safetensors.numpy.load(answer.data)["sample"].tolist() == rows["sample"][:4].tolist()
        assert server.service.waiter.waiting == 0


def test_waiting_requests_take_half_of_the_slots_and_end_when_the_server_stops(tmp_path):
    open_writer(str(tmp_path / "growing"), make_spec(), 1)
    found = []
    with serving(tmp_path, limits=ServiceLimits(max_inflight=2)) as server:
        path = "/v1/caches/growing/rows?seed=0&start=0&stop=4&wait=25"
        asking = threading.Thread(target=lambda: found.append(server.ask("GET", path).status))
        asking.start()
        while not server.service.waiter.waiting:
            time.sleep(0.01)
        begun = time.monotonic()
        assert server.ask("GET", path).status == 503
    asking.join(10)
    assert found == [503]
    assert time.monotonic() - begun < 5


def test_a_damaged_shard_is_an_error_and_never_rows(tmp_path):
    write = open_writer(str(tmp_path / "cache"), make_spec(), 1)
    for shard in range(4):
        write_shard(write, 0, shard)
    path = tmp_path / "cache/logits/c/0/1/0/0"
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    (tmp_path / "cache/logits/c/0/2/0/0").unlink()
    with serving(tmp_path) as server:
        for start in (32, 64):
            query = f"seed=0&start={start}&stop={start + 8}"
            answer = server.ask("GET", f"/v1/caches/cache/rows?{query}")
            assert (answer.status, told(answer)["code"]) == (500, "corrupt")
        assert server.ask("GET", "/v1/caches/cache/rows?seed=0&start=0&stop=32").status == 200


def test_a_cache_that_was_replaced_is_opened_anew(tmp_path):
    import shutil

    first, second = make_spec(), make_spec(weights="b" * 64)
    for spec in (first, second):
        writer = open_writer(str(tmp_path / "new" / spec.fingerprint), spec, 1)
        for shard in range(4):
            write_shard(writer, 0, shard)
    shutil.copytree(tmp_path / "new" / first.fingerprint, tmp_path / "cache")
    path = "/v1/caches/cache/rows?seed=0&start=0&stop=4"
    with serving(tmp_path) as server:
        assert first.fingerprint.encode() in server.ask("GET", path).data
        shutil.rmtree(tmp_path / "cache")
        assert server.ask("GET", path).status == 404
        shutil.copytree(tmp_path / "new" / second.fingerprint, tmp_path / "cache")
        assert second.fingerprint.encode() in server.ask("GET", path).data


def test_behind_tokens_no_proxy_may_share_rows(root):
    with serving(root, tokens=TOKENS) as server:
        path = "/v1/caches/dense/rows?seed=0&start=0&stop=4"
        answer = server.ask("GET", path, token=READ_TOKEN)
        assert "private" in answer.headers["cache-control"]


def test_an_answer_is_bounded_in_rows_and_bytes(root):
    with serving(root, limits=ServiceLimits(max_rows=16, max_response_bytes=4096)) as server:
        path = "/v1/caches/dense/rows?seed=0&start=0&stop="
        assert server.ask("GET", path + "9").status == 200
        for query in ("17", "13"):
            answer = server.ask("GET", path + query)
            assert (answer.status, told(answer)["code"]) == (413, "too_large")
            assert "at most" in told(answer)["detail"]
        assert server.ask("GET", path + "16&arrays=sample").status == 200


@pytest.mark.parametrize(("compression", "copies"), [("none", False), ("zstd", True)])
def test_only_rows_that_are_copied_count_as_memory_of_the_response(tmp_path, compression, copies):
    codec = {"kind": "topk", "k": 4, "compression": compression}
    spec = make_spec(codec=codec, num_samples=4096, shard_rows=4096, chunk_rows=1024)
    write_cache(str(tmp_path / "toy"), spec, range(1))
    app, scopes = create_app(ServeConfig(root=str(tmp_path))), []

    async def noting(scope, receive, send):
        scopes.append(scope)
        await app(scope, receive, send)

    for _ in range(2):  # from storage, and when they are ready
        answer = ask(noting, "GET", "/v1/caches/toy/rows", query="seed=0&start=0&stop=4096")
        assert answer.status == 200
        copied = scopes.pop()["state"][COPIED_BYTES]
        assert copied == len(answer.body) if copies else copied < len(answer.body) / 2


def test_ready_rows_are_read_on_the_event_loop_and_large_lookups_on_a_thread(root, monkeypatch):
    threads = []

    def noting(method):
        def noted(*args, **kwargs):
            threads.append(threading.current_thread())
            return method(*args, **kwargs)

        return noted

    for owner, name in ((OpenCache, "lookup"), (Cache, "pieces")):
        monkeypatch.setattr(owner, name, noting(getattr(owner, name)))
    with serving(root) as server:
        small, large = (np.zeros(count, "<i4").tobytes() for count in (16, 16_000))
        octets = {"Content-Type": "application/octet-stream"}
        for path, body, is_on_loop in (
            ("/v1/caches/dense/lookup?seed=0", small, True),
            ("/v1/caches/dense/lookup?seed=0", large, False),
            ("/v1/caches/dense/rows?seed=0&start=0&stop=40", None, True),
            ("/v1/caches/zstd/rows?seed=0&start=0&stop=40", None, False),
        ):
            method = "GET" if body is None else "POST"
            for _ in range(2):  # the first one opens and checks the shards
                threads.clear()
                assert server.ask(method, path, body=body, headers=octets).status == 200
            on_workers = {"AnyIO" in thread.name for thread in threads}
            assert on_workers == {not is_on_loop}, path
