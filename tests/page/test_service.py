"""The pages in the real service: what they show, who may see them, and what they never load."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from http.cookies import SimpleCookie

import pytest
from support.serving import BUILD_TOKEN, READ_TOKEN, TOKENS, serving

from cache_service.api.page import sign_in

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
BROWSER = {"Accept": "text/html"}


@pytest.fixture(scope="module")
def service(root):
    with serving(root) as running:
        yield running


@pytest.fixture(scope="module")
def closed(root):
    with serving(root, tokens=TOKENS) as running:
        yield running


def signs_in(service, token, **headers):
    body = f"token={token}&next=%2Fcaches%2Fplain%3Fa%3D1".encode()
    return service.ask("POST", "/login", body=body, headers=FORM | headers)


def test_the_first_page_shows_the_services_caches_and_traffic(service):
    service.ask("GET", "/v1/caches")
    html = service.ask("GET", "/").data.decode()
    assert "/caches/plain" in html
    assert "Median latency" in html
    assert "This server does not record caches itself" in html


def test_events_come_at_once_and_end_with_the_server(root):
    with serving(root) as service:
        answer = service.ask("GET", "/v1/events", preload_content=False)
        assert answer.headers["content-type"].startswith("text/event-stream")
        line = next(answer.stream(1 << 16)).decode()
        assert line.endswith("\n\n")
        event = json.loads(line.removeprefix("data: "))
        assert event["builds"] == []
        assert event["active"] == "0"
        begun = time.monotonic()
    assert time.monotonic() - begun < 4
    answer.release_conn()


def test_the_server_never_loads_what_renders(root):
    script = """
import sys
from support.serving import serving
with serving(sys.argv[1]) as service:
    for path in ("/", "/caches/plain", "/caches/plain/explore?seed=0&sample=1"):
        assert service.ask("GET", path).status == 200, path
print([name for name in ("torch", "torchvision", "PIL", "timm") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_stranger_with_a_browser_gets_the_form_and_a_program_the_problem(closed):
    page = closed.ask("GET", "/caches/plain?seed=%22%3E", headers=BROWSER)
    assert page.status == 401
    html = page.data.decode()
    assert '<form class="login" method="post" action="../login">' in html
    assert "plain" not in re.sub(r"<style>.*</style>", "", html, flags=re.DOTALL).replace(
        'value="/caches/plain?seed=%22%3E"', ""
    )
    assert "script" not in page.headers["content-security-policy"]
    assert page.headers["cache-control"] == "no-store"
    problem = closed.ask("GET", "/caches/plain")
    assert problem.headers["content-type"] == "application/problem+json"


def test_a_token_opens_the_pages_by_a_cookie_that_scripts_and_other_sites_cannot_use(closed):
    answer = signs_in(closed, READ_TOKEN)
    assert (answer.status, answer.headers["location"]) == (303, "./caches/plain?a=1")
    cookie = SimpleCookie(answer.headers["set-cookie"])["kd_cache_token"]
    assert cookie["httponly"]
    assert cookie["samesite"].lower() == "lax"
    assert cookie["path"] == "/"
    sent = {"Cookie": f"kd_cache_token={cookie.value}"}
    page = closed.ask("GET", "/", headers=sent)
    assert page.status == 200
    assert page.headers["cache-control"] == "no-store"
    assert "Sign out" in page.data.decode()
    assert READ_TOKEN not in page.data.decode()
    assert str(closed.service.config.root) not in page.data.decode()
    through_tls = signs_in(closed, READ_TOKEN, **{"X-Forwarded-Proto": "https"})
    assert "Secure" in through_tls.headers["set-cookie"]


def test_the_cookie_reads_and_never_builds(closed):
    sent = {"Cookie": f"kd_cache_token={BUILD_TOKEN}"}
    assert closed.ask("GET", "/v1/caches", headers=sent).status == 200
    assert closed.ask("POST", "/v1/builds", headers=sent, body=b"{}").status == 401


def test_signing_out_takes_the_cookie_back(closed):
    answer = closed.ask("POST", "/login", body=b"leave=1", headers=FORM)
    assert answer.status == 303
    assert 'kd_cache_token=""' in answer.headers["set-cookie"]
    assert "Max-Age=0" in answer.headers["set-cookie"]


def test_a_form_of_another_site_and_a_long_one_are_refused(closed):
    answer = signs_in(closed, READ_TOKEN, **{"Sec-Fetch-Site": "cross-site"})
    assert answer.status == 403
    assert "set-cookie" not in answer.headers
    assert signs_in(closed, "x" * 5000).status == 401


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://HOST", 303),
        ("https://HOST", 303),
        ("http://evil.example", 403),
        ("http://127.0.0.1:1", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_over_plain_http_the_origin_of_a_form_must_be_this_host(closed, origin, status):
    host = closed.url.removeprefix("http://")
    answer = signs_in(closed, READ_TOKEN, Origin=origin.replace("HOST", host))
    assert answer.status == status
    assert ("set-cookie" in answer.headers) == (status == 303)


def test_a_form_without_an_origin_counts_if_the_browser_says_that_it_is_its_own(closed):
    site = {"Origin": "null", "Sec-Fetch-Site": "same-origin"}
    assert signs_in(closed, READ_TOKEN, **site).status == 303
    assert signs_in(closed, READ_TOKEN, **site | {"Sec-Fetch-Site": "cross-site"}).status == 403


def test_wrong_tokens_are_refused_and_soon_not_even_heard(root):
    with serving(root, tokens=TOKENS) as service:
        for _ in range(sign_in.MAX_ATTEMPTS):
            answer = signs_in(service, "wrong")
            assert answer.status == 401
            assert "does not know the token" in answer.data.decode()
        assert signs_in(service, READ_TOKEN).status == 429


def test_one_address_that_guesses_does_not_lock_others_out_and_few_are_remembered():
    attempts = sign_in.FailedAttempts()
    for _ in range(sign_in.MAX_ATTEMPTS):
        assert attempts.wait_s("a") == 0
        attempts.add("a")
    assert 0 < attempts.wait_s("a") <= sign_in.WINDOW_S
    assert attempts.wait_s("b") == 0
    for number in range(sign_in.MAX_ADDRESSES):
        attempts.add(str(number))
    assert attempts.wait_s("a") == 0


@pytest.mark.parametrize(
    "written",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\r\nb",
        "/" + "a" * 600,
        "\u2215evil",
        "/<b>",
        "",
    ],
)
def test_nobody_is_sent_elsewhere(written):
    assert sign_in.local_path(written) == "/"


@pytest.mark.parametrize(
    "written", ["/", "/caches/c100-r32x4", "/caches/a/explore?seed=1&sample=2"]
)
def test_a_path_of_the_server_is_gone_back_to(written):
    assert sign_in.local_path(written) == written


def test_a_token_in_an_address_is_not_repeated_in_the_form(closed):
    found = closed.ask("GET", f"/caches/a?seed=1&token={READ_TOKEN}&sample=2", headers=BROWSER)
    assert found.status == 401
    assert READ_TOKEN not in found.data.decode()
    assert "/caches/a?seed=1&amp;sample=2" in found.data.decode()
