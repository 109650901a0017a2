"""The clients of `examples/` ask a service as their pages say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from support.caches import make_spec, write_cache
from support.pages import ROOT
from support.serving import READ_TOKEN, TOKENS, serving

PYTHON = [sys.executable, str(ROOT / "examples" / "client.py")]
SHELL = ["sh", str(ROOT / "examples" / "curl.sh")]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    root = tmp_path_factory.mktemp("root")
    write_cache(str(root / "c"), make_spec(num_samples=90, shard_rows=96))
    with serving(root, tokens=TOKENS) as server:
        yield server.cache_url("c")


def ran(folder, command, *arguments, token=READ_TOKEN):
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        env={**os.environ, "KD_CACHE_TOKEN": token},
        check=False,
    )


def test_the_python_client_prints_the_rows_that_it_asks_for(url, tmp_path):
    ended = ran(tmp_path, PYTHON, url, "--samples", "5", "17", "5")
    assert (ended.returncode, ended.stderr) == (0, "")
    shown = [line.partition(":")[0] for line in ended.stdout.splitlines()[1:]]
    assert shown == ["sample 5", "sample 17", "sample 5"]


@pytest.mark.parametrize(
    ("end", "token", "says"),
    [
        ("", "", "Send `Authorization: Bearer TOKEN`"),
        ("", "wrong", "needs a token"),
        ("x", READ_TOKEN, "there is no cache 'cx' here. GET /v1/caches lists them."),
    ],
)
def test_the_python_client_says_in_one_line_what_the_service_refuses(
    url, tmp_path, end, token, says
):
    ended = ran(tmp_path, PYTHON, url + end, token=token)
    assert ended.returncode == 1
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_shell_client_shows_every_route_and_ends_with_the_first_refusal(url, tmp_path):
    ended = ran(tmp_path, SHELL, url)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("# ") == 5
    assert (tmp_path / "rows.safetensors").stat().st_size > 64
    refused = ran(tmp_path, SHELL, url, token="wrong")
    assert refused.returncode != 0
    assert refused.stdout.count("# ") == 1
    assert "unauthorized" in refused.stdout
