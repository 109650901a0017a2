"""The service as a whole: health, listing, manifest, its settings, and what it never does."""

from __future__ import annotations

import json

import pytest
from support.asgi import ask
from support.caches import make_spec, write_cache
from support.command import kd_cache
from support.serving import READ_TOKEN, TOKENS, serving, serving_process

from cache_service.api import server
from cache_service.api.app import create_app
from cache_service.api.http.auth import token_sha256
from cache_service.api.http.settings import (
    Limits,
    ServeConfig,
    ServiceLimits,
    load_serve_config,
)
from cache_service.errors import ConfigError
from cache_service.rows.reader import open_cache

TOKEN = TOKENS[0]


def test_health_touches_nothing_and_readiness_lists_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    app = create_app(ServeConfig(root=str(root)))
    assert ask(app, "GET", "/readyz").status == 200
    root.rmdir()
    assert ask(app, "GET", "/healthz").status == 200
    found = ask(app, "GET", "/readyz")
    assert (found.status, json.loads(found.body)["code"]) == (503, "storage")
    assert str(root) not in found.body.decode()


def test_the_listing_says_what_each_cache_holds(server):
    listed = json.loads(server.ask("GET", "/v1/caches").data)["caches"]
    by_name = {each["name"]: each for each in listed}
    assert set(by_name) == {"dense", "zstd", "features", "half"}
    assert by_name["dense"]["seeds"] == {"complete": 2, "planned": 2}
    assert by_name["half"]["seeds"] == {"complete": 0, "planned": 2}
    assert (by_name["dense"]["rows"], by_name["half"]["rows"]) == (200, 64)


def test_a_cache_that_cannot_be_opened_does_not_hide_the_others(tmp_path):
    write_cache(str(tmp_path / "good"), make_spec(), range(1))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/zarr.json").write_text("{}")
    found = ask(create_app(ServeConfig(root=str(tmp_path))), "GET", "/v1/caches")
    lines = {each["name"]: each["error"] for each in json.loads(found.body)["caches"]}
    assert lines["good"] is None
    assert "not one that kd-cache wrote" in lines["bad"]


def test_the_manifest_is_what_a_client_opens_a_cache_by(server, root):
    answer = server.ask("GET", "/v1/caches/half")
    told = json.loads(answer.data)
    cache = open_cache(str(root / "half"))
    assert told["fingerprint"] == cache.fingerprint
    assert told["spec"] == cache.spec.model_dump(mode="json")
    assert told["commits"] == {"0": [0, 2]}
    assert (told["num_seeds"], told["num_shards"]) == (2, 4)
    assert [each["name"] for each in told["arrays"]] == ["sample", "digest", "origin", "logits"]
    assert answer.headers["cache-control"] == "no-cache"
    known = {"If-None-Match": answer.headers["etag"]}
    assert server.ask("GET", "/v1/caches/half", headers=known).status == 304


def test_an_unknown_address_and_an_unknown_method_are_problems(server):
    for method, path, status in (("GET", "/nothing", 404), ("POST", "/v1/caches", 405)):
        answer = server.ask(method, path)
        assert answer.status == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert json.loads(answer.data)["status"] == status
    assert "GET" in server.ask("DELETE", "/v1/builds").headers["allow"]


def test_pages_that_load_scripts_from_elsewhere_are_off(server):
    for path in ("/docs", "/redoc"):
        assert server.ask("GET", path).status == 404


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_an_open_address_without_tokens_is_refused(tmp_path, host):
    with pytest.raises(ConfigError, match="host"):
        load_serve_config(str(tmp_path), given={"host": host})


def test_a_token_in_place_of_its_sha256_is_refused_and_not_repeated(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"tokens": [TOKEN | {"sha256": READ_TOKEN}]}))
    with pytest.raises(ConfigError, match="not 64 hexadecimal digits") as refused:
        load_serve_config(str(tmp_path), file)
    assert READ_TOKEN not in str(refused.value)


def test_a_cache_is_no_root_and_the_folder_around_it_is_named(tmp_path):
    write_cache(str(tmp_path / "caches" / "c"), make_spec(num_samples=4))
    with pytest.raises(ConfigError, match="is a cache itself") as refused:
        create_app(ServeConfig(root=str(tmp_path / "caches" / "c")))
    assert refused.value.hint == f"kd-cache serve {tmp_path / 'caches'}"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_tokens(tmp_path, host):
    assert load_serve_config(str(tmp_path), given={"host": host}).host == host


def test_an_open_address_with_tokens_is_allowed(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"host": "0.0.0.0", "tokens": TOKENS}))
    assert load_serve_config(str(tmp_path), file).host == "0.0.0.0"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("rooot", "x"),
        ("tokens", [TOKEN, TOKEN]),
        ("tokens", [TOKEN | {"sha256": "a" * 63}]),
        ("tokens", [TOKEN | {"sha256": "A" * 64}]),
        ("tokens", [TOKEN | {"name": "a b"}]),
        ("tokens", [TOKEN | {"name": ""}]),
        ("tokens", [TOKEN | {"scopes": []}]),
        ("tokens", [TOKEN | {"scopes": ["admin"]}]),
        ("tokens", [TOKEN | {"token": READ_TOKEN}]),
        *[
            ("limits", {name: value})
            for name, value in (
                ("max_answer_bytes", 65535),
                ("max_answer_bytes", (1 << 40) + 1),
                ("max_inflight", 0),
                ("max_inflight", 65537),
                ("max_connections", 0),
                ("max_connections", 65537),
                ("threads", 0),
                ("threads", 257),
                ("wait_max_s", -1),
                ("wait_max_s", 3601),
            )
        ],
    ],
    ids=str,
)
def test_a_setting_beyond_its_bounds_is_refused(tmp_path, key, value):
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=key):
        load_serve_config(str(tmp_path), file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *sorted(set(ServiceLimits().model_dump().items()) - set(Limits().model_dump().items())),
        ("max_waiting", "half of max_inflight"),
    ],
    ids=str,
)
def test_a_limit_that_is_a_constant_is_refused_with_its_value(tmp_path, key, value):
    file = tmp_path / "serve.yaml"
    file.write_text(json.dumps({"limits": {"threads": 2, key: 1}}))
    with pytest.raises(ConfigError, match=f"limits: {key} is a constant .*, {value}; leave it out"):
        load_serve_config(str(tmp_path), file)


def test_limits_of_a_file_reach_the_service_and_half_of_the_slots_may_wait(root):
    config = ServeConfig.model_validate({"root": str(root), "limits": {"max_inflight": 10}})
    limits = create_app(config).state.service.limits
    assert (limits.max_inflight, limits.max_waiting, limits.threads) == (10, 5, Limits().threads)


def test_a_root_that_cannot_be_served_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (str(tmp_path / "nothing"), str(tmp_path / "file"), "http://host/x", "ftp://x"):
        with pytest.raises(ConfigError, match=r"is not a folder|cannot serve"):
            create_app(ServeConfig(root=root))


def test_an_open_address_without_tokens_ends_the_command_with_2(tmp_path):
    ended = kd_cache("serve", str(tmp_path), "--host", "0.0.0.0")
    assert (ended.code, ended.out) == (2, "")
    assert "kd-cache token" in ended.err


def test_a_made_token_lets_its_holder_in(tmp_path):
    write_cache(str(tmp_path / "root/toy"), make_spec(), range(1))
    made = json.loads(kd_cache("token", "--name", "me", "--json").out)
    assert made["config"] == {
        "name": "me",
        "sha256": token_sha256(made["token"]),
        "scopes": ["read"],
    }
    log = tmp_path / "log"
    with serving_process(tmp_path / "root", log=log, tokens=[made["config"]]) as server:
        assert server.ask("GET", "/v1/caches").status == 401
        assert server.ask("GET", "/v1/caches", token=made["token"]).status == 200
    assert server.process.returncode == 0
    assert made["token"] not in log.read_text()


def test_tokens_differ_and_are_long():
    made = {json.loads(kd_cache("token", "--json").out)["token"] for _ in range(5)}
    assert len(made) == 5
    assert min(len(token) for token in made) >= 43


def test_a_scope_that_is_none_is_refused():
    assert kd_cache("token", "--scope", "admin").code == 2


def test_two_servers_do_not_share_anything(root):
    with serving(root) as one, serving(root) as other:
        assert one.url != other.url
        assert one.ask("GET", "/v1/caches").data == other.ask("GET", "/v1/caches").data


def test_token_add_writes_the_serve_file_and_keeps_what_is_in_it(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("# Mine.\nport: 0  # any\nlimits: {max_inflight: 7}\n")
    first = json.loads(kd_cache("token", "--name", "a", "--add", str(file), "--json").out)
    options = ("--name", "b", "--scope", "read", "--scope", "build")
    second = json.loads(kd_cache("token", *options, "--add", str(file), "--json").out)
    text = file.read_text()
    assert text.startswith("# Mine.\nport: 0  # any\nlimits: {max_inflight: 7}\n")
    config = load_serve_config(str(tmp_path), file)
    assert [token.name for token in config.tokens] == ["a", "b"]
    assert [token.model_dump(mode="json") for token in config.tokens] == [
        first["config"],
        second["config"],
    ]
    assert config.limits.max_inflight == 7
    for made in (first, second):
        assert made["token"] not in text
    assert list(tmp_path.iterdir()) == [file]


def test_token_add_makes_the_file_and_says_so(tmp_path):
    file = tmp_path / "serve.yaml"
    ended = kd_cache("token", "--name", "a", "--add", str(file))
    assert ended.code == 0
    assert f"{file} has its SHA-256" in ended.out
    assert len(load_serve_config(str(tmp_path), file).tokens) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("tokens: []\nprot: 1\n", "unknown key"),
        ("- a\n", "contains a list"),
        ("tokens: [\n", "not YAML"),
        (None, "have the same name"),
    ],
)
def test_token_add_refuses_what_it_would_spoil_and_leaves_it_alone(tmp_path, content, says):
    file = tmp_path / "serve.yaml"
    if content is None:
        assert kd_cache("token", "--name", "a", "--add", str(file)).code == 0
        content = file.read_text()
    file.write_text(content)
    ended = kd_cache("token", "--name", "a", "--add", str(file))
    assert (ended.code, ended.out) == (2, "")
    assert says in ended.err
    assert file.read_text() == content


def test_token_add_to_a_place_that_cannot_be_written_is_one_line(tmp_path):
    ended = kd_cache("token", "--add", str(tmp_path / "nowhere" / "serve.yaml"))
    assert (ended.code, ended.out) == (2, "")
    assert "cannot be written: No such file or directory" in ended.err


def test_a_server_for_all_interfaces_announces_an_address_that_other_machines_can_use():
    for host in ("0.0.0.0", "::"):
        assert server.reachable(host) not in ("0.0.0.0", "::", "")
    assert server.reachable("127.0.0.1") == "127.0.0.1"
    assert server.reachable("example.org") == "example.org"
