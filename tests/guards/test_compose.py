"""docker-compose.yml and Dockerfile: every service can start, stop, be watched, and is nobody."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = sorted(COMPOSE["services"])
OURS = sorted(name for name in SERVICES if "build" in COMPOSE["services"][name])


@pytest.mark.parametrize("profiles", [(), ("record",), ("train",), ("s3",)])
def test_compose_accepts_the_file_under_every_profile(profiles):
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    chosen = [part for profile in profiles for part in ("--profile", profile)]
    done = subprocess.run(
        [program, *chosen, "config", "--services"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) >= {"serve", *profiles}


def test_only_the_read_only_service_starts_without_a_profile():
    started = [name for name in SERVICES if not COMPOSE["services"][name].get("profiles")]
    assert started == ["serve"]
    assert all(volume.endswith(":ro") for volume in COMPOSE["services"]["serve"]["volumes"])


@pytest.mark.parametrize("name", OURS)
def test_every_image_is_built_from_a_target_that_runs_as_a_user_without_rights(name):
    target = COMPOSE["services"][name]["build"]["target"]
    stage = re.search(
        rf"^FROM \S+ AS {target}$(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL
    )
    assert stage is not None
    assert re.findall(r"^USER (\S+)$", stage[1], re.MULTILINE) == ["kdcache"]


@pytest.mark.parametrize("name", ["record", "train"])
def test_teachers_and_students_get_a_gpu_by_reservation(name):
    reserved = COMPOSE["services"][name]["deploy"]["resources"]["reservations"]["devices"]
    assert [device["capabilities"] for device in reserved] == [["gpu"]]


@pytest.mark.parametrize("name", ["record", "s3", "serve"])
def test_what_listens_is_watched_and_reachable_from_this_machine_only(name):
    service = COMPOSE["services"][name]
    assert service["healthcheck"]["test"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_secrets_come_from_files_and_never_from_the_environment_itself():
    for name in SERVICES:
        for key, value in COMPOSE["services"][name].get("environment", {}).items():
            assert key.endswith("_FILE")
            assert value.startswith("/run/secrets/")


def test_the_image_gets_the_packages_and_nothing_else_of_the_checkout():
    allowed = (ROOT / ".dockerignore").read_text().split()
    copied = {
        part
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
        for part in line.split()[:-1]
    }
    assert {f"!{part}" for part in copied} == {part for part in allowed if part.startswith("!")}
