"""Links and printed addresses begin with the scheme, host, port and prefix of the request."""

from __future__ import annotations

import re

import pytest
from starlette.requests import Request
from support.browser import Watched
from support.html_page import Page
from support.page_service import PageService, no_images
from support.serving import READ_TOKEN, TOKENS, serving

from cache_service.api.page.visit import Visit, visit_of
from cache_service.rows.reader import open_cache


def request(host="teacher:8123", *, scheme="http", root_path="", **headers):
    headers = {"host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
    return Request(
        {
            "type": "http",
            "method": "GET",
            "path": "/",
            "query_string": b"",
            "scheme": scheme,
            "server": ("10.0.0.7", 8000),
            "root_path": root_path,
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }
    )


@pytest.mark.parametrize(
    ("asked", "url"),
    [
        (request(), "http://teacher:8123/v1/caches/c"),
        (request("teacher"), "http://teacher/v1/caches/c"),
        (request("[::1]:8000"), "http://[::1]:8000/v1/caches/c"),
        (request("kd_cache:80"), "http://kd_cache:80/v1/caches/c"),
        (request(scheme="https"), "https://teacher:8123/v1/caches/c"),
        (request("t.example", x_forwarded_proto="https"), "https://t.example/v1/caches/c"),
        (request("t.example", x_forwarded_proto="HTTPS, http"), "https://t.example/v1/caches/c"),
        (request(root_path="/kd"), "http://teacher:8123/kd/v1/caches/c"),
        (request(root_path="/kd/"), "http://teacher:8123/kd/v1/caches/c"),
    ],
)
def test_a_printed_address_is_the_one_by_which_the_page_was_requested(asked, url):
    assert visit_of(asked).cache_url("c") == url


@pytest.mark.parametrize(
    "host", ["", "a b", "a;reboot", "$(id)", "a/b", "a\nb", "a:99999999", "`id`", "<b>", "é"]
)
def test_a_host_header_that_is_no_address_never_enters_a_command(host):
    assert visit_of(request(host)).origin == "http://10.0.0.7:8000"
    assert visit_of(request(x_forwarded_proto="javascript")).origin == "http://teacher:8123"


def test_every_link_of_every_page_is_below_the_prefix(root):
    pages = PageService(root).pages(renderer=no_images())
    visit = Visit("https://host.example", "/kd")
    try:
        rendered = [
            pages.overview(visit),
            pages.cache("plain", visit),
            pages.explore("plain", "0", "3", visit),
            pages.sign_in(next_path="/", visit=visit),
        ]
    finally:
        pages.close()
    for page in rendered:
        found = Page()
        found.feed(page.html)
        targets = [
            attributes[name]
            for _, attributes in found.elements
            for name in ("href", "src", "action", "data-events")
            if name in attributes
        ]
        assert targets
        for target in targets:
            assert target.startswith(("/kd/", "#", "?", "data:")), target


def printed_command(html):
    (line,) = re.findall(r'<code id="train-command">([^<]*)</code>', html)
    return line


@pytest.mark.parametrize("tokens", [(), TOKENS], ids=["open", "tokens"])
def test_the_printed_command_trains_as_it_is_pasted(root, tokens, monkeypatch):
    with serving(root, tokens=tokens) as service:
        token = READ_TOKEN if tokens else None
        line = printed_command(service.ask("GET", "/caches/plain", token=token).data.decode())
        words = line.split()
        assert words[:4] == ["kd-cache", "train", "FILE", "--set"]
        key, _, url = words[4].partition("=")
        assert (key, url) == ("caches", service.cache_url("plain"))
        if tokens:
            monkeypatch.setenv("KD_CACHE_TOKEN", READ_TOKEN)
        assert open_cache(url).fingerprint == open_cache(str(root / "plain")).fingerprint


def test_with_tokens_the_page_says_how_the_command_gets_one(root):
    with serving(root, tokens=TOKENS) as service:
        html = service.ask("GET", "/caches/plain", token=READ_TOKEN).data.decode()
    assert "KD_CACHE_TOKEN" in html
    assert READ_TOKEN not in html


@pytest.mark.parametrize("clipboard", [True, False], ids=["clipboard", "no clipboard"])
def test_the_button_copies_the_command(browser, server, clipboard):
    watched = Watched(browser, server, permissions=["clipboard-read", "clipboard-write"])
    page = watched.page
    if not clipboard:  # as on a page that came over http from another machine
        page.add_init_script("navigator.clipboard.writeText = () => Promise.reject()")
    watched.go("/caches/plain")
    command = page.locator("#train-command").text_content()
    page.locator("button[data-copy=train-command]").click()
    page.get_by_text("Copied").wait_for(timeout=10_000)
    assert page.evaluate("navigator.clipboard.readText()") == command
    assert watched.problems == []
    watched.close()


def test_without_scripts_there_is_no_button_that_does_nothing(browser, server):
    watched = Watched(browser, server, java_script_enabled=False)
    watched.go("/caches/plain")
    assert watched.page.locator("#train-command").is_visible()
    assert not watched.page.locator("button[data-copy=train-command]").is_visible()
    watched.close()
