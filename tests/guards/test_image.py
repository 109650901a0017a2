"""The serve image, as far as it can be made without Docker: its steps in a fresh environment.

It installs packages from an index, which takes a minute, so it runs with `make faults`.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import urllib3
from guards.test_compose import COMPOSE, ROOT, last, stage
from support.builds import record_toy
from support.serving import READ_TOKEN, TOKENS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

MAX_BYTES = 400_000_000

USER = 10001

AS_USER = {"user": USER, "group": USER, "extra_groups": []} if os.geteuid() == 0 else {}
"""Arguments of `subprocess` that run a program as the user of the image."""

HEAVY = ("torch", "torchvision", "timm", "PIL", "sklearn", "ray")


@pytest.fixture(scope="module")
def image():
    """A folder that another user may enter, in which the steps of the target `serve` ran."""
    folder = Path(tempfile.mkdtemp(prefix="kd-image-"))
    folder.chmod(0o755)
    app, environment = folder / "app", folder / "env"
    app.mkdir()
    subprocess.run([python_of_everybody(), "-m", "venv", str(environment)], check=True)
    for word, rest in stage("serve"):
        if word == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                copy_allowed(ROOT / source, app / source)
        elif word == "RUN" and rest.startswith("pip "):
            command = rest.replace("pip ", f"{environment}/bin/python -m pip -q ", 1)
            subprocess.run(command, cwd=app, shell=True, check=True)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    yield folder
    shutil.rmtree(folder)


def python_of_everybody():
    """A Python that other users may run: a checkout's own may lie in somebody's home."""
    for python in (sys.executable, "/usr/bin/python3"):
        command = [python, "-c", "import ensurepip"]
        try:
            if subprocess.run(command, check=False, **AS_USER).returncode == 0:
                return python
        except OSError:
            continue
    return pytest.skip("no Python that another user may run can make environments")


def copy_allowed(source, target):
    """Copy what `.dockerignore` lets into the build."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "**/__pycache__" in ignored
    assert any(fnmatch.fnmatch(f"!{source.name}", line) for line in ignored)


def size_of(folder):
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_serve_image_installs_less_than_400_mb_and_no_torch(image):
    packages = next((image / "env" / "lib").glob("python*")) / "site-packages"
    installed = {path.name.lower() for path in packages.iterdir()}
    assert "fastapi" in installed
    assert not installed & {name.lower() for name in HEAVY}
    assert size_of(packages) < MAX_BYTES


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_its_entry_point_serves_as_a_user_who_can_write_nowhere_and_stops_in_time(image):
    caches, config = image / "caches", image / "serve.yaml"
    record_toy(str(caches / "toy"), seeds="0:1")
    config.write_text(json.dumps({"tokens": TOKENS}))
    subprocess.run(["chmod", "-R", "a+rX,go-w", str(caches)], check=True)
    written = {"/caches": str(caches), "/etc/kd-cache/serve.yaml": str(config)}
    program, *arguments = [*last("serve", "ENTRYPOINT"), *last("serve", "CMD")]
    command = [f"{image}/env/bin/{program}", *(written.get(word, word) for word in arguments)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--json"],
        cwd=image / "app",
        env={"PATH": "/usr/bin:/bin", "HOME": COMPOSE["services"]["serve"]["environment"]["HOME"]},
        **AS_USER,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    before = {path: path.stat().st_mtime_ns for path in image.rglob("*")}
    try:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        url = json.loads(line)["url"].replace("0.0.0.0", "127.0.0.1")
        (*_, check) = COMPOSE["services"]["serve"]["healthcheck"]["test"]
        code = check.replace("http://127.0.0.1:8000", url)
        assert code != check
        subprocess.run([f"{image}/env/bin/python", "-c", code], check=True, **AS_USER)
        headers = {"Authorization": f"Bearer {READ_TOKEN}"}
        with urllib3.PoolManager(retries=False) as pool:
            rows = "/v1/caches/toy/rows?seed=0&start=0&stop=8"
            for path in ("/", "/caches/toy", "/caches/toy/explore", rows):
                answer = pool.request("GET", url + path, headers=headers, timeout=60)
                assert answer.status == 200, (path, answer.data)
            assert pool.request("GET", f"{url}/v1/caches", timeout=60).status == 401
        process.send_signal(signal.Signals[last("serve", "STOPSIGNAL")])
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    grace_s = int(COMPOSE["services"]["serve"]["stop_grace_period"].removesuffix("s"))
    process.communicate(timeout=grace_s)
    assert process.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in image.rglob("*")} == before
