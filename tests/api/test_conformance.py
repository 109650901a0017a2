"""What OpenAPI says is what the service does: schemathesis asks, nothing fails, nothing is 5xx."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.serving import BUILD_TOKEN, TOKENS, serving

SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")

CONFIG = """
[parameters]
"path.name" = "{name}"

# A schema cannot say that start is below stop, which arrays a cache has, or how much is too much.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 401, 403, 404, 409, 413, 415, 422, 429, 503]
"""

NOT_SERVER_ERRORS = """
# Of a build that goes on: rows that are planned, and to be asked for again.
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 503]
"""


def attack(server, folder, name, num_examples):
    config = folder / f"{name}.toml"
    config.write_text(CONFIG.format(name=name) + (NOT_SERVER_ERRORS if name == "half" else ""))
    return subprocess.run(
        [
            str(SCHEMATHESIS),
            *("--config-file", str(config), "run", f"{server.url}/openapi.json"),
            *("--checks", "all", "--max-examples", str(num_examples), "--no-color"),
            *("--generation-deterministic", "--exclude-path-regex", "/events$"),
            *("-H", f"Authorization: Bearer {BUILD_TOKEN}"),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )


@pytest.fixture(scope="module")
def guarded(root):
    if not SCHEMATHESIS.is_file():
        pytest.skip(f"schemathesis is not installed beside {sys.executable}")
    with serving(root, tokens=TOKENS) as running:
        yield running


def test_the_service_does_what_its_document_says(guarded, tmp_path):
    # Takes 6 s: every operation in every way that the document allows and forbids.
    done = attack(guarded, tmp_path, "dense", 5)
    assert done.returncode == 0, done.stdout


@pytest.mark.faults
@pytest.mark.parametrize(("name", "num_examples"), [("dense", 200), ("half", 30)])
def test_hundreds_of_examples_of_each_operation_find_nothing(guarded, tmp_path, name, num_examples):
    done = attack(guarded, tmp_path, name, num_examples)
    assert done.returncode == 0, done.stdout
