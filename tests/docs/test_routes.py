"""The service's page names every route, and no other."""

from __future__ import annotations

import re

import pytest
from starlette.testclient import TestClient
from support.pages import ROOT

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
