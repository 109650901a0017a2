"""Names in a config file become Python objects, or one line says what is missing."""

from __future__ import annotations

import sys

import pytest

from cache_service.errors import ConfigError, DatasetError, UnsupportedError
from cache_service.plugins import call_factory, load_object

FACTORIES = """
import json
from cache_service.errors import UnsupportedError

NUMBER = 3
def plain(): return "plain"
def sized(num_classes=10, *, depth=2): return num_classes, depth
def several(**kwargs): return kwargs
def needs(width, num_classes): return width
def positional(width, /): return width
def fails(num_classes): return json.loads("nothing")
def imports(): import a_library_that_is_not_there
def exits(): raise SystemExit(3)
def refuses(): raise UnsupportedError("not here", hint="Go there.")
def loud():
    print("hello")
    return 1
async def later(): return 1
class Made:
    def __init__(self, num_classes): self.num_classes = num_classes
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    (tmp_path / "kd_cache_plugin_a.py").write_text("COUNT = 3\nclass Factory: pass\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "needs.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "fails.py").write_text("import json\n\nraise RuntimeError('mine')\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(2)\n")
    (tmp_path / "relative.py").write_text("from .broken import x\n")
    (tmp_path / "loud.py").write_text("print('hello')\nclass A:\n    def make(): return 5\n")
    (tmp_path / "factories.py").write_text(FACTORIES)
    yield tmp_path
    for name in ("kd_cache_plugin_a", "factories", "loud", "neighbour"):
        sys.modules.pop(name, None)


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
        ("json:dump_all", r"'json:dump_all': json \(.*\) has no 'dump_all'\. Define it"),
        ("kd_cache_plugin_a:factory", "Did you mean 'Factory'"),
        ("no_such_module:x", "importing no_such_module failed: No module named"),
        ("no/such/file.py:x", r"there is no file .*no/such/file\.py"),
        ("broken.py:x", "importing broken.py failed: invalid syntax"),
        (
            "needs:x",
            "importing needs failed: No module named 'a_library_that_is_not_there'. Install a_lib",
        ),
        ("json.no_such:x", "importing json.no_such failed.*Run from the directory"),
        ("relative.py:x", "no known parent package. Write package.module:name"),
        ("fails.py:x", r"importing fails.py failed: RuntimeError: mine \(fails.py, line 3\)\."),
        ("exits:x", r"it ended the program \(exits.py, line 2\)\. Code that parses arguments"),
        ("kd_cache_plugin_a:Factory.x", r"kd_cache_plugin_a \(/.*_a\.py\) has no 'Factory\.x'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(project, path, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        load_object(path)
    assert "\n" not in str(refusal.value)


def test_an_import_that_fails_leaves_no_module(project):
    before = set(sys.modules)
    with pytest.raises(ConfigError, match="mine"):
        load_object("fails.py:x")
    assert set(sys.modules) == before


def test_a_name_may_have_dots_and_what_a_module_prints_goes_to_stderr(project, capsys):
    assert load_object("loud:A.make")() == 5
    assert capsys.readouterr() == ("", "hello\n")


def test_a_file_finds_the_modules_beside_it(project):
    (project / "nets").mkdir()
    (project / "nets" / "neighbour.py").write_text("COUNT = 7\n")
    (project / "nets" / "main.py").write_text("from neighbour import COUNT\n")
    assert load_object("nets/main.py:COUNT") == 7


def test_a_file_in_the_home_folder_is_found(project, monkeypatch):
    monkeypatch.setenv("HOME", str(project))
    assert load_object("~/kd_cache_plugin_a.py:COUNT") == 3


@pytest.mark.parametrize("module", ["factories", "factories.py"])
@pytest.mark.parametrize(
    ("name", "arguments", "made"),
    [
        ("plain", {"num_classes": 7}, "plain"),
        ("sized", {"num_classes": 7, "depth": 3}, (7, 3)),
        ("several", {"num_classes": 7, "wings": 2}, {"num_classes": 7, "wings": 2}),
        ("loud", {}, 1),
    ],
)
def test_a_factory_gets_what_it_takes(project, module, name, arguments, made, capsys):
    path = f"{module}:{name}"
    assert call_factory(path, arguments, makes="thing", optional={"num_classes"}) == made
    assert capsys.readouterr().out == ""


def test_a_class_is_a_factory(project):
    assert call_factory("factories:Made", {"num_classes": 3}, makes="thing").num_classes == 3


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("NUMBER", {}, "thing factories:NUMBER is a int, not a function. Name a function or a cla"),
        ("later", {}, "is a coroutine function, not a function"),
        ("plain", {"num_classes": 7}, "does not take num_classes. It takes no arguments. Argum"),
        ("sized", {"wings": 1, "legs": 2}, r"does not take legs, wings. It takes \(num_classes=10"),
        ("needs", {"wings": 1}, "does not take wings and needs width, num_classes"),
        ("positional", {"width": 1}, r"needs width. It takes \(width, /\). Arguments are given in"),
        ("fails", {"num_classes": 7}, r"failed: JSONDecodeError: .* \(factories.py, line 11\)\."),
        ("imports", {}, r"ModuleNotFoundError: No module .*_there' \(factories.py, line 12\)"),
        ("exits", {}, r"it ended the program \(factories.py, line 13\)"),
    ],
)
def test_a_factory_that_cannot_make_it_is_one_line_with_its_name(project, name, arguments, says):
    with pytest.raises(DatasetError, match=says) as refusal:
        call_factory(
            f"factories:{name}", arguments, makes="thing", given_in="args", error=DatasetError
        )
    assert f"thing factories:{name}" in refusal.value.message
    assert "\n" not in str(refusal.value)


def test_a_pipeline_itself_in_place_of_its_factory_is_told_from_wrong_arguments(project):
    says = r"pipeline factories:positional needs width.* a function without arguments that makes"
    with pytest.raises(ConfigError, match=says):
        call_factory("factories:positional", {}, makes="pipeline")


def test_an_error_of_this_project_leaves_a_factory_unchanged(project):
    with pytest.raises(UnsupportedError, match=r"^not here Go there\.$"):
        call_factory("factories:refuses", {}, makes="thing")
