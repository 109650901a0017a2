"""Nothing but health is open: the list of routes is the application's own."""

from __future__ import annotations

import json

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route
from support.asgi import ask
from support.serving import BUILD_TOKEN, READ_TOKEN, TOKENS, serving

from cache_service.api.app import create_app
from cache_service.api.http.auth import OPEN, needed_scope
from cache_service.api.http.problems import Problem
from cache_service.api.http.settings import ServeConfig

VALUES = {"name": "dense", "key": "zarr.json", "build_id": "0" * 16}


def application(root):
    return create_app(ServeConfig.model_validate({"root": str(root), "tokens": TOKENS}))


def routes_of(router, prefix=""):
    for route in router.routes:
        if isinstance(route, Route | APIRoute):
            yield prefix + route.path, route.methods
        elif hasattr(route, "original_router"):
            yield from routes_of(route.original_router, prefix)
        else:
            raise AssertionError(f"{route!r} is of a kind that this test does not know")


def every_request(app):
    """(method, path) of each route, with values for what its path names."""
    for path, methods in routes_of(app):
        for name, value in VALUES.items():
            path = path.replace(f"{{{name}}}", value).replace(f"{{{name}:path}}", value)
        assert "{" not in path, f"VALUES has nothing for {path}"
        for method in sorted(methods | {"GET", "POST", "DELETE"}):
            yield method, path


def test_the_list_of_routes_is_not_empty(root):
    paths = {path for _, path in every_request(application(root))}
    assert paths >= {
        "/",
        "/caches/dense",
        "/caches/dense/explore",
        "/metrics",
        "/openapi.json",
        "/v1/builds",
        f"/v1/builds/{'0' * 16}/events",
        "/v1/caches/dense/lookup",
        "/v1/caches/dense/rows",
        "/v1/caches/dense/zarr/zarr.json",
        "/v1/events",
    }


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {READ_TOKEN}"},
        {"authorization": READ_TOKEN},
        {"authorization": f"Bearer {READ_TOKEN}x"},
        {"authorization": f"Bearer {READ_TOKEN[:-1]}"},
        {"authorization": f"Bearer {TOKENS[0]['sha256']}"},
        {"authorization": "Bearer caf\xe9"},
        {"cookie": "kd_cache_token=wrong"},
        {"cookie": "kd_cache_token"},
        {"x-api-key": READ_TOKEN},
    ],
    ids=str,
)
def test_no_route_is_open_without_a_token(root, headers):
    app = application(root)
    for method, path in every_request(app):
        found = ask(app, method, path, headers=headers)
        if (method, path) == ("POST", "/login"):
            assert found.status < 500  # it is where a token is handed in
        elif (method, path) in OPEN:
            assert found.status == 200, path
        else:
            assert found.status == 401, (method, path)
            assert found.headers["www-authenticate"].startswith("Bearer")
            if method != "HEAD":
                Problem.model_validate_json(found.body)


def test_a_token_in_the_address_is_no_token(root):
    app = application(root)
    for method, path in every_request(app):
        if (method, path) not in OPEN:
            for query in (f"token={READ_TOKEN}", f"access_token={READ_TOKEN}"):
                assert ask(app, method, path, query=query).status == 401


def test_what_is_open_is_health_and_signing_in():
    assert {path for _, path in OPEN} == {"/healthz", "/readyz", "/login"}


def test_paths_that_look_like_an_open_one_are_not_open(root):
    app = application(root)
    for path in ("/healthz/", "//healthz", "/v1/../healthz", "/HEALTHZ", "/healthz/x", "/login/x"):
        assert ask(app, "GET", path).status == 401


def test_a_reader_may_read_and_not_build(root):
    app = application(root)
    headers = {"authorization": f"bearer {READ_TOKEN}"}
    for method, path in every_request(app):
        if (method, path) in OPEN or path.endswith("/events"):
            continue
        found = ask(app, method, path, headers=headers)
        assert found.status != 401
        assert (found.status == 403) == (needed_scope(method, path) == "build"), (method, path)
    assert ask(app, "POST", "/v1/builds", headers=headers).status == 403
    assert ask(app, "DELETE", f"/v1/builds/{'0' * 16}", headers=headers).status == 403
    assert ask(app, "POST", "/v1/caches/dense/lookup", headers=headers).status == 415


def test_a_builder_gets_to_the_builds(root):
    headers = {"authorization": f"Bearer {BUILD_TOKEN}"}
    found = ask(application(root), "POST", "/v1/builds", headers=headers)
    assert found.status in (404, 422)


def test_a_cookie_reads_and_never_builds(root):
    app = application(root)
    headers = {"cookie": f"other=1; kd_cache_token={BUILD_TOKEN}"}
    assert ask(app, "GET", "/v1/caches", headers=headers).status == 200
    assert ask(app, "HEAD", "/v1/caches/dense", headers=headers).status == 200
    assert ask(app, "POST", "/v1/builds", headers=headers).status == 401
    assert ask(app, "DELETE", f"/v1/builds/{'0' * 16}", headers=headers).status == 401


def test_every_token_is_compared_in_constant_time(root, monkeypatch):
    from cache_service.api.http import auth

    compared = []
    honest = auth.hmac.compare_digest

    def counted(one, other):
        compared.append((len(one), len(other)))
        return honest(one, other)

    monkeypatch.setattr(auth.hmac, "compare_digest", counted)
    app = application(root)
    ask(app, "GET", "/v1/caches", headers={"authorization": f"Bearer {READ_TOKEN}"})
    ask(app, "GET", "/v1/caches", headers={"authorization": "Bearer x"})
    assert compared == [(64, 64)] * 4


def test_a_token_shows_up_nowhere(root):
    with serving(root, tokens=TOKENS) as server:
        seen = [
            server.ask("GET", path, token=token).data
            for token in (READ_TOKEN, "canary-" + "x" * 36)
            for path in ("/v1/caches", "/nothing", "/metrics", "/v1/caches/x/rows?seed=x")
        ]
        assert server.ask("GET", "/openapi.json").status == 401
        assert server.ask("GET", "/openapi.json", token=READ_TOKEN).status == 200
    for body in seen:
        assert READ_TOKEN.encode() not in body
        assert b"canary" not in body


def test_without_tokens_everybody_may_ask(root):
    app = create_app(ServeConfig(root=str(root)))
    found = ask(app, "GET", "/v1/caches")
    assert found.status == 200
    assert {each["name"] for each in json.loads(found.body)["caches"]} >= {"dense", "half"}
