"""`kd-cache bench http` in its smallest form: real processes, right answers, one document."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from support.command import kd_cache

from cache_service.format.layout import CacheLayout, default_layout
from cache_service.rows.reader import open_cache
from cli.experiments.bench import cpu, http
from cli.experiments.bench.http import write_bench_cache
from cli.experiments.bench.load import measure

TINY = http.Sizes(num_samples=4096, rounds=1, requests={"range": 4, "lookup": 8}, cpu_requests=40)


@pytest.fixture
def ended(monkeypatch, tmp_path):
    monkeypatch.setattr(http, "QUICK", TINY)
    monkeypatch.setattr(http, "CONCURRENCY", (1, 4))
    monkeypatch.setattr(http, "DIFFERENT_REQUESTS", 4)
    return kd_cache("bench", "http", "--quick", "--json", "--out", str(tmp_path))


def test_bench_http_keeps_its_page_and_every_figure_as_one_document(ended, tmp_path):
    assert ended.code == 0
    document = json.loads(ended.out)
    kept = json.loads((tmp_path / "http.json").read_text())
    assert kept["machine"]["cores"] >= 1
    assert set(kept["versions"]) == {"fastapi", "uvicorn", "httptools"}
    assert kept["figures"] == document["figures"]
    page = (tmp_path / "http.md").read_text()
    assert page.count("| lookup of 256 rows | ") == 2
    assert "| raw key, 64 rows | " in page
    [found] = document["figures"]
    asked = [(each["kind"], each["concurrency"]) for each in found["measured"]]
    assert asked == [(kind, n) for kind in ("range", "lookup") for n in (1, 4)]
    for each in found["measured"]:
        assert 0 < each["p50_ms"] <= each["p99_ms"]
        assert each["per_second"] > 0
        assert math.isclose(
            each["ratio"], each["per_second"] / each["constant_per_second"], rel_tol=1e-6
        )
    assert found["requests"] == 2 * (4 + 8)
    goals = [each["what"].partition(":")[0] for each in document["goals"]]
    timed = [each["kind"] for each in found["cpu_us"] if each["nginx"]]  # 0 where too short
    assert goals == ["ranges", "lookups", *(kind for kind in timed if kind.startswith("range"))]
    assert found["kinds"]["lookup"]["rows"] == 256
    assert 0.9 * 2**23 < found["kinds"]["range"]["bytes"] <= 2**23
    assert [each["kind"] for each in found["cpu_us"]] == [
        *("range of 256 rows", "range of 64 rows", "raw key, 256 rows", "raw key, 64 rows"),
    ]
    for each in found["cpu_us"]:
        assert each["service"] >= 0
        assert (each["nginx"] is None) == (cpu.NGINX is None)
    memory = found["memory"]
    assert 0 < memory["before"]["anonymous"] <= memory["before"]["resident"]


def test_a_bench_that_is_not_known_is_refused_with_one_that_is():
    ended = kd_cache("bench", "dns")
    assert ended.code == 2
    assert "kd-cache bench http" in ended.err


def test_the_cache_that_is_measured_is_a_real_one(tmp_path):
    spec = write_bench_cache(str(tmp_path / "bench"), 4200)
    opened = open_cache(str(tmp_path / "bench"))
    assert opened.complete_seeds() == [0]
    assert spec.layout == default_layout(CacheLayout(spec).row_bytes, 4200)
    rows = opened.read(0, 4000, 4200)
    assert rows["logits"].shape == (200, 1, 1000)
    assert sorted(opened.read(0, 0, 4200)["sample"].tolist()) == list(range(4200))


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    status = 200

    def do_GET(self):
        self.send_response(self.status)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)

    def log_message(self, *_):
        pass


@pytest.fixture
def port():
    server = HTTPServer(("127.0.0.1", 0), _Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


def test_the_client_counts_what_it_was_sent(port):
    found = measure(port, [ASK], concurrency=1, count=20)
    assert len(found["latencies"]) == 20
    assert sum(found["latencies"]) <= found["seconds"]
    assert 20 * 1000 < found["num_bytes"] < 20 * 1500


def test_the_client_takes_no_other_answer_than_200(port, monkeypatch):
    monkeypatch.setattr(_Answer, "status", 503)
    with pytest.raises(ConnectionError, match="503"):
        measure(port, [ASK], concurrency=1, count=1)
