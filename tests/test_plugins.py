"""Names in a config file become Python objects, or one line says what is missing."""

from __future__ import annotations

import sys

import pytest

from cache_service.errors import ConfigError
from cache_service.plugins import load_object


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "kd_cache_plugin_a.py").write_text("COUNT = 3\nclass Factory: pass\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "needs.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "fails.py").write_text("raise RuntimeError('mine')\n")
    yield tmp_path
    sys.modules.pop("kd_cache_plugin_a", None)


def test_installed_modules_are_found():
    assert load_object("json:dumps") is __import__("json").dumps


def test_modules_of_the_current_directory_are_found(project):
    assert load_object("kd_cache_plugin_a:COUNT") == 3


def test_a_file_is_found_by_its_path_and_run_once(project):
    once = load_object("kd_cache_plugin_a.py:Factory")
    assert load_object(f"{project}/kd_cache_plugin_a.py:Factory") is once
    assert sys.modules[once.__module__].Factory is once


def test_files_of_one_name_are_two_modules(project):
    (project / "sub").mkdir()
    (project / "sub" / "kd_cache_plugin_a.py").write_text("COUNT = 4\n")
    assert load_object("sub/kd_cache_plugin_a.py:COUNT") == 4
    assert load_object("kd_cache_plugin_a.py:COUNT") == 3


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("json", "'json' names no Python object; write module:name"),
        ("json:", "names no Python object"),
        (":dumps", "names no Python object"),
        ("json:dump_all", r"'json:dump_all': json has no 'dump_all'\. Define it"),
        ("kd_cache_plugin_a:factory", "Did you mean 'Factory'"),
        ("no_such_module:x", "importing no_such_module failed: No module named"),
        ("no/such/file.py:x", r"there is no file .*no/such/file\.py"),
        ("broken.py:x", "importing broken.py failed: invalid syntax"),
        ("needs:x", "importing needs failed: No module named 'a_library_that_is_not_there'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(project, path, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        load_object(path)
    assert "\n" not in str(refusal.value)


def test_an_error_of_the_users_own_code_stays_theirs_and_leaves_no_module(project):
    before = set(sys.modules)
    with pytest.raises(RuntimeError, match="mine"):
        load_object("fails.py:x")
    assert set(sys.modules) == before
