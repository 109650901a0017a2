"""docker-compose.yml and Dockerfile: every service can start, stop, be watched, and is nobody."""

from __future__ import annotations

import json
import posixpath
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from support.serving import KD_CACHE, TOKENS, serving

from cache_service.api.builds.supervisor import Builds
from cache_service.api.http.settings import BuildsConfig, ServeConfig
from cache_service.api.server import GRACE_SECONDS

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE = yaml.safe_load(TEXT)
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES = sorted(COMPOSE["services"])
OURS = sorted(name for name in SERVICES if "build" in COMPOSE["services"][name])


def stage(target):
    """The instructions of a build target: (word, rest) each, those of `base` first."""
    text = re.sub(r"\\\n", " ", DOCKERFILE)
    stages, current = {}, []
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()
            current = stages[name] = list(stages.get(parent, ()))
        elif word.isupper():
            current.append((word, rest))
    return stages[target]


def last(target, word):
    """The instruction that holds; of ENTRYPOINT and CMD as a list."""
    (*_, value) = [rest for found, rest in stage(target) if found == word]
    return json.loads(value) if value.startswith("[") else value


def mounts(name):
    """Folders and files of a service: path inside -> whether it can be written."""
    found = {}
    for volume in COMPOSE["services"][name].get("volumes", ()):
        _, inside, *mode = volume.split(":")
        found[inside] = mode != ["ro"]
    return found


def command_of(name):
    """The command line of a service: program, command, arguments."""
    service = COMPOSE["services"][name]
    target = service["build"]["target"]
    return [*last(target, "ENTRYPOINT"), *(service.get("command") or last(target, "CMD"))]


@pytest.mark.parametrize("profile", ["", "record", "train", "s3"])
def test_compose_accepts_the_file_under_every_profile(profile):
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed")
    chosen = ["--profile", profile] if profile else []
    done = subprocess.run(
        [program, *chosen, "config"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    resolved = yaml.safe_load(done.stdout)["services"]
    assert {"serve", *([profile] if profile else [])} <= set(resolved)
    for name in resolved:
        if name in OURS:
            assert resolved[name]["build"]["target"] == name


def test_only_the_read_only_service_starts_without_a_profile():
    started = [name for name in SERVICES if not COMPOSE["services"][name].get("profiles")]
    assert started == ["serve"]
    assert all(volume.endswith(":ro") for volume in COMPOSE["services"]["serve"]["volumes"])


@pytest.mark.parametrize("name", OURS)
def test_every_image_is_built_from_a_target_that_runs_as_a_user_without_rights(name):
    target = COMPOSE["services"][name]["build"]["target"]
    assert last(target, "USER") == "kdcache"
    (created,) = [rest for word, rest in stage(target) if word == "RUN" and "useradd" in rest]
    assert "--uid 10001 kdcache" in created
    after = [word for word, _ in stage(target)]
    assert "RUN" not in after[after.index("USER") :]  # everything is installed before


@pytest.mark.parametrize("name", OURS)
def test_every_service_runs_a_command_that_exists_on_files_that_are_mounted(name):
    program, command, *arguments = command_of(name)
    assert program in PYPROJECT["project"]["scripts"]
    help_command = [sys.executable, "-c", KD_CACHE, command, "--help"]
    done = subprocess.run(help_command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    options = re.findall(r"--[a-z-]+", done.stdout)
    home = COMPOSE["services"][name].get("working_dir", last(name, "WORKDIR"))
    for word in arguments:
        if word.startswith("--"):
            assert word in options
        elif "/" in word or word.endswith(".yaml"):
            path = posixpath.join(home, word)
            assert any(posixpath.commonpath([path, inside]) == inside for inside in mounts(name)), (
                path
            )


def test_what_the_commands_write_lies_in_folders_that_can_be_written():
    database = Builds("/caches", BuildsConfig())._database()
    assert str(database).startswith("/caches/")
    assert mounts("record")["/caches"]
    assert not mounts("serve")["/caches"]
    # `out` of a train file is relative to the folder of the command.
    assert mounts("train")[COMPOSE["services"]["train"]["working_dir"]]
    for name in OURS:
        written = {inside for inside, is_written in mounts(name).items() if is_written}
        assert written <= {"/caches", "/work"}


@pytest.mark.parametrize("name", ["record", "serve"])
def test_a_service_on_a_read_only_root_has_a_place_for_temporary_files_and_caches(name):
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["tmpfs"] == ["/tmp"]
    assert service["environment"]["HOME"] == "/tmp"
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert int(service["stop_grace_period"].removesuffix("s")) > GRACE_SECONDS + 1


@pytest.mark.parametrize("name", ["record", "serve"])
def test_the_published_port_is_the_one_that_the_command_listens_on(name):
    port = ServeConfig.model_fields["port"].default
    assert last(name, "EXPOSE") == str(port)
    assert [each.rpartition(":")[2] for each in COMPOSE["services"][name]["ports"]] == [str(port)]
    assert "--port" not in command_of(name)


def test_the_health_check_passes_on_a_service_that_runs_and_fails_on_one_that_does_not(tmp_path):
    program, *arguments = COMPOSE["services"]["serve"]["healthcheck"]["test"][1:]
    assert program == "python"

    def check(url):
        written = [part.replace("http://127.0.0.1:8000", url) for part in arguments]
        assert written != arguments
        return subprocess.run(
            [sys.executable, *written], capture_output=True, check=False
        ).returncode

    with serving(tmp_path, tokens=TOKENS) as service:
        assert check(service.url) == 0
    assert check(service.url) != 0


def test_the_commands_in_the_comments_name_profiles_and_services():
    lines = re.findall(r"^#   docker compose (.+)$", TEXT, re.MULTILINE)
    lines += re.findall(
        r"^docker compose (.+)$", (ROOT / "docs/serving.md").read_text(), re.MULTILINE
    )
    assert len(lines) >= 6
    for line in lines:
        words = line.partition("  ")[0].split()
        if words[0] == "--profile":
            profile, words = words[1], words[2:]
            assert profile in COMPOSE["services"][words[-1]]["profiles"]
        assert words[0] in ("up", "run")
        assert words[-1] in SERVICES  # so the command is the service's own


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
            assert key == "HOME" or (key.endswith("_FILE") and value.startswith("/run/secrets/"))


def test_the_image_gets_the_packages_and_nothing_else_of_the_checkout():
    allowed = (ROOT / ".dockerignore").read_text().split()
    copied = {
        part
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)
        for part in line.split()[:-1]
    }
    assert {f"!{part}" for part in copied} == {part for part in allowed if part.startswith("!")}
