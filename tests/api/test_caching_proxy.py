"""A cache that is replaced under its name is never sent old by a proxy that keeps responses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import urllib3
import zarr
from support.caches import make_rows, make_spec, write_cache
from support.fronts import NGINX, nginx
from support.ordered import write_ordered
from support.pages import ROOT
from support.serving import serving
from support.sockets import free_port

from cache_service.errors import SpecMismatchError
from cache_service.remote.source import open_source
from cache_service.rows.reader import open_cache

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")

CACHING = """
proxy_cache_path {folder}/kept keys_zone=kept:1m;
server {{
    listen 127.0.0.1:{port};
    location / {{
        proxy_pass http://127.0.0.1:{target};
        proxy_cache kept;
        proxy_cache_revalidate on;
        proxy_force_ranges on;
        {more}
        proxy_set_header Host localhost;
        add_header X-Kept $upstream_cache_status;
    }}
}}
"""

OLD, NEW = make_spec(), make_spec(codec={"kind": "dense", "compression": "zstd"})


class Proxied(NamedTuple):
    url: str
    root: str

    def ask(self, path):
        return urllib3.request("GET", self.url + path, retries=False)

    def replace(self):
        """Put another cache under the name."""
        shutil.rmtree(f"{self.root}/c")
        write_cache(f"{self.root}/c", NEW, range(2))


@pytest.fixture
def proxied(tmp_path, request):
    """With a parameter: another line of the proxy's configuration."""
    root = tmp_path / "root"
    write_cache(str(root / "c"), OLD, range(1))
    with serving(root) as service:
        target, port = service.url.rpartition(":")[2], free_port()
        more = getattr(request, "param", "")
        block = CACHING.format(folder=tmp_path, port=port, target=target, more=more)
        with nginx(tmp_path, block, port):
            yield Proxied(f"http://127.0.0.1:{port}", str(root))


@pytest.mark.parametrize("path", ["rows?seed=0&start=0&stop=4", "zarr/logits/c/0/0/0/0"])
def test_without_the_fingerprint_nothing_old_is_sent(proxied, path):
    old = proxied.ask(f"/v1/caches/c/{path}")
    assert (old.status, old.headers["cache-control"]) == (200, "no-cache")
    assert old.headers["etag"]
    proxied.replace()
    new = proxied.ask(f"/v1/caches/c/{path}")
    assert new.status == 200
    assert new.headers["etag"] != old.headers["etag"]
    assert new.data != old.data


@pytest.mark.parametrize("path", ["rows?seed=0&start=0&stop=4&", "zarr/logits/c/0/0/0/0?"])
def test_with_the_fingerprint_the_proxy_keeps_what_it_saw_and_another_cache_is_refused(
    proxied, path
):
    url = f"/v1/caches/c/{path}fingerprint="
    first = proxied.ask(url + OLD.fingerprint)
    assert "immutable" in first.headers["cache-control"]
    kept = proxied.ask(url + OLD.fingerprint)
    assert (kept.headers["x-kept"], kept.data) == ("HIT", first.data)
    proxied.replace()
    other = proxied.ask(url + "0" * 64)
    assert (other.status, other.json()["code"]) == (409, "spec_mismatch")
    assert OLD.fingerprint != NEW.fingerprint
    new = proxied.ask(url + NEW.fingerprint)
    assert (new.status, new.headers["x-kept"]) == (200, "MISS")


def test_zarr_reads_the_new_rows(proxied):
    url = f"{proxied.url}/v1/caches/c/zarr"
    assert zarr.open_group(url, mode="r")["sample"].shape[0] == 1
    proxied.replace()
    group = zarr.open_group(url, mode="r")
    assert group["sample"].shape[0] == 2
    np.testing.assert_array_equal(group["sample"][1], make_rows(NEW, 1)["sample"])


def test_a_student_is_refused_when_the_cache_is_replaced_behind_a_proxy(proxied):
    shutil.rmtree(f"{proxied.root}/c")
    write_ordered(f"{proxied.root}/c", make_spec(num_samples=300, shard_rows=64, chunk_rows=16))
    url = f"{proxied.url}/v1/caches/c"
    local, remote = open_cache(f"{proxied.root}/c"), open_source(url)
    for _ in range(2):
        np.testing.assert_array_equal(remote.read(0, 0, 8)["logits"], local.read(0, 0, 8)["logits"])
    proxied.replace()
    with pytest.raises(SpecMismatchError, match="another cache under this name"):
        remote.read(0, 100, 108)


def test_the_example_client_shows_the_rows_of_the_cache_that_is_there(proxied):
    for fingerprint in (OLD.fingerprint, NEW.fingerprint):
        shown = show(proxied)
        assert shown.returncode == 0, shown.stderr
        first, *rows = shown.stdout.splitlines()
        assert first == f"fingerprint {fingerprint}"
        assert len(rows) == 8
        proxied.replace()


def show(proxied):
    command = [sys.executable, str(ROOT / "examples" / "client.py"), f"{proxied.url}/v1/caches/c"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("proxied", ["proxy_cache_key $uri;"], indirect=True)
def test_the_example_client_never_shows_rows_of_another_cache(proxied):
    """A proxy that takes URLs for one that differ in their query sends the old rows."""
    assert show(proxied).returncode == 0
    proxied.replace()
    shown = show(proxied)
    assert (shown.returncode, shown.stdout) == (1, f"fingerprint {NEW.fingerprint}\n")
    assert shown.stderr == "the response is of another cache than the one that was opened\n"
