"""Advice does not rot: the program takes every command that a page or an error names."""

from __future__ import annotations

import ast
import re
import tomllib

import pytest
import yaml
from support.pages import ROOT, blocks, inline_code, pages
from support.program import commands_in, program, refuse_unparsed

SHELL = [(str(block), words) for block in blocks("sh") for words in commands_in(block.text)]

INLINE = [
    (page.relative_to(ROOT).as_posix(), code)
    for page in pages()
    for code in dict.fromkeys(inline_code(page))
    if code.startswith("kd-cache ")
]


def hints():
    """Backticked commands in the string literals of the packages; a value is written as 1."""
    for package in ("cache_service", "distill", "cli"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                for code in re.findall(r"`(kd-cache [^`]+)`", literal(node)):
                    yield file.relative_to(ROOT).as_posix(), code


def literal(node):
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "1" for part in node.values
        )
    return ""


@pytest.mark.parametrize(("where", "words"), SHELL)
def test_a_command_in_a_shell_block_parses_and_its_settings_are_valid(where, words):
    refuse_unparsed(words)


@pytest.mark.parametrize(("where", "code"), INLINE)
def test_a_command_named_in_passing_parses(where, code):
    refuse_unparsed(commands_in(code)[0])


@pytest.mark.parametrize(("where", "code"), dict.fromkeys(hints()))
def test_a_command_that_an_error_advises_parses(where, code):
    refuse_unparsed(commands_in(code)[0], with_settings=False)


def test_there_is_something_to_check():
    assert len(SHELL) > 20
    assert len(INLINE) > 10
    assert len(list(hints())) > 5


def test_a_wrong_command_would_be_noticed():
    with pytest.raises(AssertionError, match="no command"):
        refuse_unparsed(["bild", "FILE"])
    with pytest.raises(Exception, match="No such option"):
        refuse_unparsed(["build", "FILE", "--seed", "1"])
    with pytest.raises(Exception, match="unknown key"):
        refuse_unparsed(["train", "FILE", "--set", "method.tau=3"])
    with pytest.raises(AssertionError, match="no file"):
        refuse_unparsed(["train", "examples/nowhere.yaml"])


def test_make_targets_and_scripts_that_pages_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    text = "".join(page.read_text() for page in pages())
    for target in set(re.findall(r"(?:`|^)make (\w+)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for script in set(re.findall(r"python ((?:docs|examples)/\w+\.py)", text)):
        assert (ROOT / script).is_file(), script


def test_the_readme_lists_every_command():
    readme = (ROOT / "README.md").read_text()
    for name in program().commands:
        assert f"`kd-cache {name}" in readme


def test_the_readme_lists_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    paragraph = re.search(r"^Extras: .*?\n\n", readme, re.DOTALL | re.MULTILINE)[0]
    listed = set(re.findall(r"`(\w+)`", paragraph))
    assert listed >= project["optional-dependencies"].keys() - {"test", "lint"}


def test_the_exit_codes_of_the_errors_are_in_the_tables():
    from cache_service import errors

    codes = {
        each.exit_code
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, errors.KdCacheError)
    }
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)
    sentence = re.search(r"Exit codes:(.*?)\. ", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    for listed in (table, re.findall(r"(?:^|;)\s*(\d+) ", sentence)):
        assert {int(code) for code in listed} == codes | {0, 130}


def test_the_job_for_kubernetes_runs_a_command_that_parses():
    job = yaml.safe_load((ROOT / "examples" / "kuberay" / "rayjob.yaml").read_text())
    (words,) = commands_in(job["spec"]["entrypoint"])
    refuse_unparsed(["build", "examples/digits.build.yaml", *words[2:]])
    mounted = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert words[1].startswith(mounted["volumeMounts"][0]["mountPath"])
