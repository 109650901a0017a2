"""The service's page names every route and no other, and metrics that there are."""

from __future__ import annotations

import re

import pytest
import yaml
from starlette.testclient import TestClient
from support.build_queue import builds_document
from support.pages import ROOT, blocks_of
from support.serving import READ_TOKEN, TOKENS

from cache_service.api.app import create_app
from cache_service.api.http.settings import ServeConfig
from docs.service import PAGES, openapi

TEXT = (ROOT / "docs" / "serving.md").read_text()


def test_every_route_for_programs_is_on_the_page_once():
    for path, methods in openapi()["paths"].items():
        for method in methods:
            assert TEXT.count(f"`{method.upper()} {path}`") >= 1


def test_every_path_that_the_page_names_is_a_route(tmp_path):
    named = set(re.findall(r"`(?:GET|POST|DELETE) (/[^ `]*)`", TEXT))
    assert named - openapi()["paths"].keys() == {path for _, path, _ in PAGES}


@pytest.mark.parametrize(("method", "path", "what"), PAGES)
def test_the_pages_for_people_are_there(method, path, what, tmp_path):
    app = create_app(ServeConfig(root=str(tmp_path)))
    answer = TestClient(app, base_url="http://localhost").request(
        method, path.replace("{name}", "none")
    )
    assert answer.headers["content-type"].startswith("text/html")


def test_a_metric_that_the_page_names_is_measured_for_a_token_that_reads(tmp_path):
    config = {"root": str(tmp_path), "tokens": TOKENS, "builds": builds_document()}
    client = TestClient(create_app(ServeConfig.model_validate(config)))
    client.get("/readyz")
    assert client.get("/metrics").status_code == 401
    read = {"Authorization": f"Bearer {READ_TOKEN}"}
    client.get("/v1/caches", headers=read)  # there is a request to be measured
    figures = client.get("/metrics", headers=read).text
    named = set(re.findall(r"`((?:kdcache|process)_\w+)`", TEXT))
    assert len(named) > 10
    assert [name for name in named if f"# TYPE {name} " not in figures] == []


def test_the_block_for_prometheus_asks_with_a_token_where_the_walk_serves():
    blocks = [b.text for b in blocks_of(ROOT / "docs" / "serving.md") if "scrape_configs" in b.text]
    (job,) = yaml.safe_load(blocks[0])["scrape_configs"]
    assert job.keys() == {"job_name", "authorization", "static_configs"}  # default path /metrics
    assert job["authorization"].keys() == {"credentials_file"}
    (target,) = job["static_configs"][0]["targets"]
    assert f"http://{target}/v1/caches/digits" in TEXT
