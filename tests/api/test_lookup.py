"""Rows of samples over HTTP, in request order; whatever is sent, an answer or a refusal."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from support.caches import make_rows, make_spec, open_writer, write_shard
from support.ordered import ordered_rows
from support.serving import serving

from cache_service.format.frame import CHECKSUM_HEADER, checksum_of
from cache_service.rows.reader import open_cache
from cache_service.views.order import epoch_order, positions_of

OCTETS, JSON = "application/octet-stream", "application/json"
LOOKUP = "/v1/caches/dense/lookup"


def by_json(server, document, name="dense", **headers):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    path = f"/v1/caches/{name}/lookup"
    return server.ask("POST", path, body=body, headers={"Content-Type": JSON, **headers})


def by_octets(server, body, query="seed=0", name="dense"):
    path = f"/v1/caches/{name}/lookup?{query}"
    return server.ask("POST", path, body=body, headers={"Content-Type": OCTETS})


def code(answer):
    assert answer.headers["content-type"] == "application/problem+json"
    return json.loads(answer.data)["code"]


@given(samples=st.lists(st.integers(0, 99), min_size=1, max_size=300), seed=st.integers(0, 1))
def test_samples_come_in_request_order_also_twice(server, root, samples, seed):
    wanted = open_cache(str(root / "dense")).lookup(seed, np.array(samples))
    body = np.array(samples, "<i4").tobytes()
    for answer in (
        by_json(server, {"seed": seed, "samples": samples}),
        by_octets(server, body, f"seed={seed}"),
    ):
        assert answer.status == 200
        assert answer.headers[CHECKSUM_HEADER] == checksum_of(answer.data)
        found = safetensors.numpy.load(answer.data)
        assert set(found) == set(wanted)
        for name, values in wanted.items():
            assert found[name].tobytes() == values.tobytes()


def test_json_and_octets_are_answered_with_the_same_bytes(server):
    asked = {"seed": 1, "samples": [5, 2, 5], "arrays": ["logits", "sample"]}
    one = by_json(server, asked)
    other = by_octets(server, np.array([5, 2, 5], "<i4").tobytes(), "seed=1&arrays=sample%2Clogits")
    assert one.data == other.data


def test_json_is_answered_for_eyes(server):
    answer = by_json(server, {"seed": 0, "samples": [3, 1], "arrays": ["sample"]}, Accept=JSON)
    shown = json.loads(answer.data)
    assert shown["arrays"] == {"sample": [3, 1]}
    assert (shown["seed"], shown["rows"]) == (0, 2)


@pytest.mark.parametrize(
    ("document", "status", "found"),
    [
        ({"seed": 0, "samples": []}, 422, "request"),
        ({"seed": 0, "samples": [-1]}, 422, "request"),
        ({"seed": 0, "samples": [2**63]}, 422, "request"),
        ({"seed": 0, "samples": [2**70]}, 422, "request"),
        ({"seed": 2**63, "samples": [1]}, 422, "request"),
        ({"seed": -1, "samples": [1]}, 422, "request"),
        ({"seed": 0, "samples": ["1"]}, 422, "request"),
        ({"seed": 0, "samples": [1.5]}, 422, "request"),
        ({"seed": 0, "samples": [True]}, 422, "request"),
        ({"seed": 0, "samples": [[1]]}, 422, "request"),
        ({"seed": 0, "samples": [1], "arrays": []}, 422, "request"),
        ({"seed": 0, "samples": [1], "arrays": ["nothing"]}, 422, "request"),
        ({"seed": 0, "samples": [1], "extra": 1}, 422, "request"),
        ({"samples": [1]}, 422, "request"),
        ([], 422, "request"),
        (b"", 422, "request"),
        (b"{", 422, "request"),
        (b"\xff\xfe", 422, "request"),
        (b"[" * 100_000, 422, "request"),
        ({"seed": 0, "samples": [100]}, 404, "rows_not_built"),
        ({"seed": 0, "samples": [2**31 - 1]}, 404, "rows_not_built"),
        ({"seed": 9, "samples": [1]}, 404, "rows_not_built"),
        ({"seed": 0, "samples": [0] * 16385}, 413, "too_large"),
        ({"seed": 0, "samples": list(range(1_000_000))}, 413, "too_large"),
    ],
    ids=lambda value: f"{str(value)[:40]}:{len(str(value))}",
)
def test_what_cannot_be_answered_is_refused_with_a_reason(server, document, status, found):
    answer = by_json(server, document)
    assert (answer.status, code(answer)) == (status, found)


@pytest.mark.parametrize(
    ("body", "query", "status", "found"),
    [
        (b"", "seed=0", 422, "request"),
        (b"abc", "seed=0", 422, "request"),
        (b"\0" * 5, "seed=0", 422, "request"),
        (b"\xff" * 8, "seed=0", 422, "request"),
        (b"\0" * 8, "", 422, "request"),
        (b"\0" * 8, "seed=x", 422, "request"),
        (b"\0" * 4 * 16385, "seed=0", 413, "too_large"),
        (b"\0" * 4_000_000, "seed=0", 413, "too_large"),
        (b"\xff\xff\xff\x7f", "seed=0", 404, "rows_not_built"),
    ],
    ids=lambda value: f"{str(value)[:40]}:{len(str(value))}",
)
def test_a_binary_body_that_cannot_be_answered_is_refused(server, body, query, status, found):
    answer = by_octets(server, body, query)
    assert (answer.status, code(answer)) == (status, found)


def test_another_type_of_body_is_refused(server):
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-pickle", ""):
        answer = server.ask("POST", LOOKUP, body=b"\0" * 8, headers={"Content-Type": kind})
        assert (answer.status, code(answer)) == (415, "unsupported_media_type")


def test_a_query_beside_a_json_body_is_refused(server):
    body = json.dumps({"seed": 0, "samples": [1]}).encode()
    answer = server.ask("POST", LOOKUP + "?seed=1", body=body, headers={"Content-Type": JSON})
    assert (answer.status, code(answer)) == (422, "request")


def test_while_a_seed_is_recorded_its_samples_are_found_by_its_order(tmp_path):
    spec = make_spec()
    writer = open_writer(str(tmp_path / "growing"), spec, 1)
    rows = ordered_rows(spec, 0)
    write_shard(writer, 0, 1, rows=rows)
    recorded, missing = rows["sample"][32:64], rows["sample"][:32]
    with serving(tmp_path) as server:
        body = recorded[::-1].astype("<i4").tobytes()
        answer = by_octets(server, body, name="growing")
        assert answer.status == 200
        found = safetensors.numpy.load(answer.data)
        np.testing.assert_array_equal(found["sample"], recorded[::-1])
        np.testing.assert_array_equal(found["logits"], rows["logits"][32:64][::-1])
        answer = by_octets(server, missing.astype("<i4").tobytes(), name="growing")
        assert (answer.status, code(answer)) == (503, "rows_not_built")
        for shard in (0, 2, 3):
            write_shard(writer, 0, shard, rows=rows)
        answer = by_octets(server, missing.astype("<i4").tobytes(), "seed=0&wait=5", "growing")
        np.testing.assert_array_equal(
            safetensors.numpy.load(answer.data)["logits"], rows["logits"][:32]
        )


def test_a_cache_in_another_order_is_looked_up_in_its_own(server):
    rows = make_rows(make_spec(), 0)
    recorded = {0, 2}
    there = [s for p, s in enumerate(rows["sample"].tolist()) if p // 32 in recorded]
    planned = positions_of(epoch_order(100, 0)) // 32
    samples = np.array([s for s in there if planned[s] in recorded])
    assert len(samples) > 9
    answer = by_octets(server, samples.astype("<i4").tobytes(), name="half")
    found = safetensors.numpy.load(answer.data)
    where = [rows["sample"].tolist().index(s) for s in samples]
    np.testing.assert_array_equal(found["sample"], samples)
    np.testing.assert_array_equal(found["digest"], rows["digest"][where])


def test_figures_call_a_lookup_by_its_route(server):
    by_octets(server, np.array([1], "<i4").tobytes())
    figures = server.ask("GET", "/metrics").data.decode()
    assert 'kdcache_requests_total{code="200",route="/v1/caches/{name}/lookup"}' in figures
