"""Below a path of another site: every address that the service gives leads back to it."""

from __future__ import annotations

import json
import re

import pytest
from pydantic import ValidationError
from support.asgi import ask
from support.build_queue import builds_document, request_document
from support.caches import make_spec, write_cache
from support.command import kd_cache
from support.serving import READ_TOKEN, TOKENS, serving

from cache_service.api.app import create_app
from cache_service.api.http.settings import OWN_PATHS, ServeConfig
from cache_service.api.page import routes as page_routes
from cache_service.api.page import sign_in

LOCAL = {"Host": "localhost"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("root")
    write_cache(str(folder / "c"), make_spec(), range(1))
    return folder


def app_of(folder, **config):
    return create_app(ServeConfig.model_validate({"root": str(folder), **config}))


@pytest.fixture(scope="module")
def app(folder):
    return app_of(folder, prefix="/kd")


@pytest.fixture(scope="module")
def trusting(folder):
    return app_of(folder, trust_proxy=True)


@pytest.mark.parametrize(
    "path", ["/healthz", "/v1/caches/c/rows?seed=0&start=0&stop=4", "/", "/caches/c", "/nothing"]
)
def test_a_path_is_answered_the_same_with_and_without_its_prefix(app, path):
    path, _, query = path.partition("?")
    plain = ask(app, "GET", path, query=query, headers=LOCAL)
    below = ask(app, "GET", f"/kd{path}", query=query, headers=LOCAL)
    assert below.status == plain.status
    if path != "/":  # whose figures change
        assert re.sub(rb"\.\./", b"", below.body) == re.sub(rb"\.\./", b"", plain.body)


def test_the_prefix_alone_is_the_first_page_and_no_part_of_a_name(app):
    assert ask(app, "GET", "/kd", headers=LOCAL).status == 200
    for path in ("/kdx/healthz", "/other/healthz", "/kd/kd/healthz"):
        assert ask(app, "GET", path, headers=LOCAL).status == 404


def test_links_of_a_page_are_below_the_prefix_and_relative_if_nobody_named_it(app, folder):
    def links(app, path):
        html = ask(app, "GET", path, headers=LOCAL).body.decode()
        return set(re.findall(r'(?:href|src|action)="([^"#?]+)', html))

    assert all(link.startswith("/kd/") for link in links(app, "/kd/caches/c"))
    unknown = app_of(folder)
    assert {"./static/page.css", "./caches/c"} <= links(unknown, "/")
    assert {"../../static/page.css", "../../"} <= links(unknown, "/caches/c/explore")
    assert not any(link.startswith("/") for link in links(unknown, "/caches/c"))


def test_printed_addresses_and_openapi_have_the_prefix(app):
    html = ask(app, "GET", "/kd/caches/c", headers=LOCAL).body.decode()
    assert "http://localhost/kd/v1/caches/c" in html
    document = json.loads(ask(app, "GET", "/kd/openapi.json", headers=LOCAL).body)
    assert document["servers"] == [{"url": "/kd"}]


def test_the_cookie_is_for_the_prefix_only_and_signing_in_stays_below_it(folder):
    app = app_of(folder, prefix="/kd", tokens=TOKENS)
    body = f"token={READ_TOKEN}&next=/caches/c".encode()
    signed = ask(app, "POST", "/kd/login", headers=LOCAL, body=body)
    assert (signed.status, signed.headers["location"]) == (303, "./caches/c")
    assert "Path=/kd;" in signed.headers["set-cookie"]
    left = ask(app, "POST", "/kd/login", headers=LOCAL, body=b"leave=1")
    assert left.headers["location"] == "./"
    assert "Path=/kd;" in left.headers["set-cookie"]
    stranger = ask(app, "GET", "/kd/caches/c", headers={**LOCAL, "Accept": "text/html"})
    assert stranger.status == 401
    assert b'action="/kd/login"' in stranger.body
    assert b'value="/caches/c"' in stranger.body


def test_the_place_of_a_build_has_the_prefix(tmp_path):
    with serving(tmp_path, prefix="/kd", builds=builds_document()) as server:
        made = server.ask("POST", "/kd/v1/builds", json=request_document(teacher="lost"))
        assert made.status == 202
        assert made.headers["location"] == f"/kd/v1/builds/{made.json()['id']}"
        assert server.ask("GET", made.headers["location"]).json()["id"] == made.json()["id"]


def test_a_prefix_of_a_trusted_proxy_counts_and_of_anybody_else_does_not(trusting, folder):
    sent = {**LOCAL, "X-Forwarded-Prefix": "/a/b/"}
    assert (
        b"http://localhost/a/b/v1/caches/c" in ask(trusting, "GET", "/caches/c", headers=sent).body
    )
    assert (
        b"http://localhost/v1/caches/c"
        in ask(app_of(folder), "GET", "/caches/c", headers=sent).body
    )


@pytest.mark.parametrize(
    "prefix",
    ["kd", "//evil.example", "/a/../b", "/a b", "/caches", "/v1/x", "/<b>", "/" + "x" * 80],
)
def test_what_is_no_prefix_is_refused(trusting, folder, prefix):
    answer = ask(
        trusting, "GET", "/", headers={**LOCAL, "X-Forwarded-Prefix": prefix.replace("\n", "")}
    )
    assert (answer.status, json.loads(answer.body)["code"]) == (400, "bad_request")
    with pytest.raises(ValidationError, match="is no prefix"):
        ServeConfig.model_validate({"root": str(folder), "prefix": prefix})


def test_every_path_of_the_service_begins_with_one_of_its_own(app):
    pages = (*page_routes.router.routes, *sign_in.router.routes)
    paths = {*app.openapi()["paths"], *(route.path for route in pages), app.openapi_url}
    assert {path.split("/")[1] for path in paths - {"/"}} == set(OWN_PATHS)


def test_the_client_that_a_trusted_proxy_saw_is_the_one_that_is_logged(folder, caplog):
    sent = {**LOCAL, "X-Forwarded-For": "10.0.0.9, 192.0.2.7"}
    for config, client in (({"trust_proxy": True}, "192.0.2.7"), ({}, "127.0.0.1")):
        caplog.clear()
        with caplog.at_level("INFO", logger="kdcache.requests"):
            ask(app_of(folder, **config), "GET", "/healthz", headers=sent)
        (line,) = [each for each in caplog.records if each.name == "kdcache.requests"]
        assert line.fields["client"] == client
        assert line.fields["route"] == "/healthz"


def test_serve_refuses_a_prefix_that_is_none(tmp_path):
    ended = kd_cache("serve", str(tmp_path), "--prefix", "caches/")
    assert ended.code == 2
    assert "is no prefix: write a path such as /kd" in ended.err
