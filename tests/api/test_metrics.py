"""Figures for Prometheus and for the page: named as its rules say, with few labels."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cache_service.api.http.limits import ConcurrencyLimiter
from cache_service.api.http.log import RequestRecord
from cache_service.api.http.metrics import WINDOW_SECONDS, Metrics, RecentTraffic, quantile
from cache_service.api.http.settings import ServiceLimits


def seen(route="/v1/caches/{name}/rows", status=200, code="", seconds=0.01, num_bytes=100):
    return RequestRecord("id", "GET", route, status, code, seconds, num_bytes, "127.0.0.1", "", {})


def families(metrics):
    return {
        family.name: family for family in text_string_to_metric_families(metrics.render().decode())
    }


def value(metrics, name, **labels):
    return metrics.registry.get_sample_value(name, labels)


@pytest.fixture
def metrics():
    made = Metrics()
    made.watch(ConcurrencyLimiter(ServiceLimits(max_inflight=3, max_streams=2, threads=1)))
    return made


def test_a_request_is_counted_by_route_and_code_and_its_time_by_route(metrics):
    for _ in range(2):
        metrics.observe(seen())
    metrics.observe(seen(status=404))
    route = "/v1/caches/{name}/rows"
    assert value(metrics, "kdcache_requests_total", route=route, code="200") == 2
    assert value(metrics, "kdcache_requests_total", route=route, code="404") == 1
    assert value(metrics, "kdcache_request_duration_seconds_count", route=route) == 3
    assert value(metrics, "kdcache_response_bytes_total") == 300


def test_failures_are_counted_by_the_code_of_their_problem(metrics):
    metrics.observe(seen(status=500, code="corrupt"))
    metrics.observe(seen(status=500))
    metrics.observe(seen(status=404, code="not_a_cache"))
    assert value(metrics, "kdcache_read_errors_total", code="corrupt") == 1
    assert value(metrics, "kdcache_read_errors_total", code="error") == 1
    assert value(metrics, "kdcache_read_errors_total", code="not_a_cache") is None


def test_an_open_stream_does_not_count_as_a_slow_request(metrics):
    metrics.observe(seen(route="/v1/events", seconds=3600))
    assert value(metrics, "kdcache_request_duration_seconds_count", route="/v1/events") is None
    assert value(metrics, "kdcache_requests_total", route="/v1/events", code="200") == 1


def test_gauges_show_the_gate_as_it_is():
    limiter = ConcurrencyLimiter(ServiceLimits(max_inflight=3, max_streams=2, threads=1))
    metrics = Metrics()
    metrics.watch(limiter)
    limiter.enter(stream=False)
    limiter.enter(stream=True)
    assert value(metrics, "kdcache_inflight_requests") == 1
    assert value(metrics, "kdcache_event_streams") == 1
    assert value(metrics, "kdcache_reading_threads") == 0


def test_names_follow_the_rules_of_prometheus(metrics):
    metrics.observe(seen(status=500))
    metrics.rows.inc(5)
    metrics.count_refusal("idle")
    found = families(metrics)
    assert {
        "kdcache_requests",
        "kdcache_request_duration_seconds",
        "kdcache_rows",
        "kdcache_response_bytes",
        "kdcache_inflight_requests",
        "kdcache_read_errors",
        "kdcache_refused_connections",
        "kdcache_build_info",
    } <= set(found)
    for family in found.values():
        assert re.fullmatch(r"(kdcache|process)_[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        names = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert names == {f"{family.name}_total"}


def test_many_caches_and_rows_add_no_series(metrics):
    metrics.observe(seen())
    before = metrics.render().count(b"\n")
    for number in range(100):
        metrics.observe(seen()._replace(names={"name": f"cache-{number}"}))
    assert metrics.render().count(b"\n") == before


def test_two_applications_count_apart():
    one, other = Metrics(), Metrics()
    one.observe(seen())
    assert value(other, "kdcache_response_bytes_total") == 0


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_the_last_minute_is_what_the_page_sees():
    clock = Clock()
    live = RecentTraffic(clock)
    for second in range(WINDOW_SECONDS * 2):
        clock.now = 100.0 + second
        live.observe(seen(seconds=0.010, num_bytes=50))
    live.observe(seen(status=503, seconds=0.500))
    figures = live.figures()
    assert figures["requests_per_s"] == pytest.approx(1.0, rel=0.05)
    assert figures["bytes_per_s"] == pytest.approx(50, rel=0.05)
    assert figures["failed_per_s"] == pytest.approx(1 / WINDOW_SECONDS)
    assert figures["p50_s"] == pytest.approx(0.010)
    assert figures["p99_s"] == pytest.approx(0.500)
    clock.now += WINDOW_SECONDS + 1
    quiet = live.figures()
    assert (quiet["requests_per_s"], quiet["p50_s"]) == (0, None)


def test_a_young_service_is_not_divided_by_a_whole_minute():
    clock = Clock()
    live = RecentTraffic(clock)
    clock.now += 2
    for _ in range(10):
        live.observe(seen())
    assert live.figures()["requests_per_s"] == 5


def test_a_quantile_is_a_value_that_was_seen():
    assert quantile([1.0], 0.99) == 1.0
    assert quantile([float(n) for n in range(1, 101)], 0.99) == 99.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0


def test_the_process_itself_is_measured(server):
    figures = server.ask("GET", "/metrics").data.decode()
    for name in ("cpu_seconds_total", "resident_memory_bytes", "open_fds", "start_time_seconds"):
        (line,) = [each for each in figures.splitlines() if each.startswith(f"process_{name} ")]
        assert float(line.split()[1]) > 0
