"""The examples of docs/serving.md for nginx and Caddy: with TLS, below a path, with tokens."""

from __future__ import annotations

import re
import time
from http.cookies import SimpleCookie

import numpy as np
import pytest
import urllib3
from support.caches import make_spec
from support.fronts import CADDY, NGINX, OPENSSL, adapted, caddy, nginx, self_signed
from support.ordered import write_ordered
from support.pages import ROOT, blocks_of
from support.serving import READ_TOKEN, TOKENS, serving
from support.sockets import free_port

from cache_service.remote.source import open_source
from cache_service.rows.reader import open_cache

PAGE = ROOT / "docs" / "serving.md"


def examples(language):
    """The configuration of a whole site, and what takes its place below a path."""
    whole, below = (each.text for each in blocks_of(PAGE) if each.language == language)
    return whole, below


def by_nginx(folder, port, service_port):
    whole, below = examples("nginx")
    site, locations = whole[: whole.index("    location / {")], below + "}\n"
    return nginx(
        folder,
        adapted(
            site + locations,
            {
                "server 127.0.0.1:8000;": f"server 127.0.0.1:{service_port};",
                "listen 443 ssl;": f"listen 127.0.0.1:{port} ssl;",
                "/etc/ssl/certs/teacher.pem": str(folder / "cert.pem"),
                "/etc/ssl/private/teacher.key": str(folder / "key.pem"),
            },
        ),
        port,
    )


def by_caddy(folder, port, service_port):
    whole, below = examples("caddyfile")
    site = whole[: whole.index("\treverse_proxy")] + below + "}\n"
    changes = {
        "{\n\tservers": "{\n\tadmin off\n\tauto_https off\n\tservers",
        "teacher.example.org {": f"https://localhost:{port} {{\n"
        f"\ttls {folder}/cert.pem {folder}/key.pem",
        "reverse_proxy 127.0.0.1:8000": f"reverse_proxy 127.0.0.1:{service_port}",
    }
    return caddy(folder, adapted(site, changes), port)


FRONTS = [
    pytest.param(front, id=name, marks=pytest.mark.skipif(not program, reason=f"no {name} here"))
    for name, front, program in (("nginx", by_nginx, NGINX), ("caddy", by_caddy, CADDY))
]
pytestmark = pytest.mark.skipif(not OPENSSL, reason="openssl is not installed")


@pytest.fixture(scope="module", params=FRONTS)
def site(request, tmp_path_factory):
    """The address of a service below /kd, its certificate, and its folder."""
    folder = tmp_path_factory.mktemp("front")
    spec = make_spec(num_samples=300, shard_rows=64, chunk_rows=16)
    write_ordered(folder / "root" / "c", spec)
    self_signed(folder)
    with serving(folder / "root", prefix="/kd", tokens=TOKENS) as service:
        port, service_port = free_port(), int(service.url.rpartition(":")[2])
        with request.param(folder, port, service_port):
            yield f"https://localhost:{port}/kd", folder


@pytest.fixture(scope="module")
def ask(site):
    url, folder = site
    with urllib3.PoolManager(ca_certs=str(folder / "cert.pem"), retries=False) as pool:
        yield lambda method, path, **more: pool.request(method, url + path, redirect=False, **more)


def test_a_student_reads_through_the_proxy(site, monkeypatch):
    url, folder = site
    monkeypatch.setenv("SSL_CERT_FILE", str(folder / "cert.pem"))
    monkeypatch.setenv("KD_CACHE_TOKEN", READ_TOKEN)
    local, remote = open_cache(str(folder / "root/c")), open_source(f"{url}/v1/caches/c")
    for name, values in local.read(1, 0, 300).items():
        np.testing.assert_array_equal(remote.read(1, 0, 300)[name], values)
    samples = np.array([5, 2])
    np.testing.assert_array_equal(
        remote.lookup(0, samples)["logits"], local.lookup(0, samples)["logits"]
    )


def test_a_visitor_signs_in_below_the_path_and_finds_every_link_there(site, ask):
    url, _ = site
    origin = url.removesuffix("/kd")
    html = {"Accept": "text/html"}
    assert ask("GET", "/", headers=html).status == 401
    body = f"token={READ_TOKEN}&next=/caches/c"
    form = {"Content-Type": "application/x-www-form-urlencoded", "Origin": origin}
    signed = ask("POST", "/login", body=body, headers=form)
    # Relative, or made whole by the proxy.
    assert signed.headers["location"] in ("./caches/c", "/kd/caches/c", f"{url}/caches/c")
    (cookie,) = SimpleCookie(signed.headers["set-cookie"]).values()
    assert (cookie["path"], cookie["secure"], cookie["samesite"]) == ("/kd", True, "lax")
    sent = {"Cookie": f"{cookie.key}={cookie.value}", **html}
    page = ask("GET", "/caches/c", headers=sent)
    text = page.data.decode()
    assert f"{url}/v1/caches/c" in text
    links = set(re.findall(r'(?:href|src|action)="(/[^"#?]*)', text))
    assert "/kd/static/page.css" in links
    for link in links - {"/kd/login"}:
        found = ask("GET", link.removeprefix("/kd"), headers=sent)
        # A form redirects to the page that it found, below the path.
        assert found.status == 200 or "/kd/" in found.headers["location"], link
    other = ask("POST", "/login", body=body, headers={**form, "Origin": "https://evil.example"})
    assert other.status == 403


def test_events_come_one_by_one(ask):
    headers = {"Authorization": f"Bearer {READ_TOKEN}"}
    answer = ask("GET", "/v1/events", headers=headers, preload_content=False)
    begun, received = time.monotonic(), b""
    while received.count(b"data: ") < 2:
        received += answer.read1(4096)
    answer.close()
    assert time.monotonic() - begun < 3  # one event a second


def test_large_headers_and_bodies_are_refused(ask):
    assert ask("GET", "/healthz", headers={"X": "a" * 80_000}).status in (400, 431)
    headers = {"Authorization": f"Bearer {READ_TOKEN}", "Content-Type": "application/octet-stream"}
    # Only the status is read: Caddy 2.6 closes the request and says 502, or cuts off the body.
    long = ask(
        "POST",
        "/v1/caches/c/lookup?seed=0",
        body=bytes(3 << 20),
        headers=headers,
        preload_content=False,
    )
    assert long.status in (413, 502)
    long.close()


def test_outside_of_the_path_there_is_nothing_of_the_service(site):
    url, folder = site
    with urllib3.PoolManager(ca_certs=str(folder / "cert.pem"), retries=False) as pool:
        outside = pool.request("GET", url.removesuffix("/kd") + "/healthz")
        assert b'"status":"ok"' not in outside.data
