"""Files and overrides to models; every mistake is one line that names its key."""

from __future__ import annotations

import math
import re
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from cache_service.config import EXPANDED, Frozen, load_yaml_config, parse_yaml, validate_config
from cache_service.errors import ConfigError


class Slow(Frozen):
    name: Literal["slow"] = "slow"
    patience: Annotated[int, Field(ge=1)] = 3


class Fast(Frozen):
    name: Literal["fast"] = "fast"
    speed: Annotated[float, Field(gt=0)] = 1.0


class Part(Frozen):
    weight: float
    label: str = "x"


class Machine(Frozen):
    title: str
    engine: Annotated[Slow | Fast, Field(discriminator="name")]
    parts: tuple[Part, ...] = ()
    spare: Part | None = None
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.5

    @model_validator(mode="after")
    def _check(self) -> Machine:
        if self.title == "bad":
            raise ValueError("title is bad;\nchoose another")
        return self


GOOD = "title: m\nengine: {name: fast, speed: 1e1}\nparts: [{weight: 1}, {weight: 2}]\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "machine.yaml"
    path.write_text(GOOD)
    return path


def test_a_good_file_is_the_model(file):
    machine = load_yaml_config(Machine, file)
    assert machine.engine == Fast(speed=10)
    assert [part.weight for part in machine.parts] == [1, 2]


@pytest.mark.parametrize(
    ("override", "reads"),
    [
        ("title=other", lambda m: m.title == "other"),
        ("engine.speed=2", lambda m: m.engine.speed == 2),
        ("engine={name: slow}", lambda m: m.engine == Slow()),
        ("parts.1.weight=9", lambda m: m.parts[1].weight == 9),
        ("spare.weight=4", lambda m: m.spare == Part(weight=4)),
        ("spare=null", lambda m: m.spare is None),
        ("title=a=b", lambda m: m.title == "a=b"),
        ("title='8:16'", lambda m: m.title == "8:16"),
    ],
)
def test_an_override_sets_one_value(file, override, reads):
    assert reads(load_yaml_config(Machine, file, [override]))


def test_the_last_override_wins(file):
    assert load_yaml_config(Machine, file, ["ratio=0", "ratio=1"]).ratio == 1


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("ratio", r"--set 'ratio' is not of the form a\.b=value"),
        ("=3", "not of the form"),
        ("engine..speed=3", "not of the form"),
        ("parts.7.weight=1", "parts is a list of 2; '7' is not an index of it"),
        ("parts.first=1", "'first' is not an index of it"),
        ("title.x=1", "title is 'm', which has no keys. Set title as a whole"),
        ("title=[1", r"--set title line 1, column \d+: not YAML"),
    ],
)
def test_an_override_that_has_no_place_is_refused(file, override, says):
    with pytest.raises(ConfigError, match=says):
        load_yaml_config(Machine, file, [override])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("titel=x", r"machine\.yaml: titel: unknown key, did you mean title\?"),
        ("engine.sped=1", r"engine\.sped: unknown key, did you mean speed\?"),
        ("engine.patience=1", r"engine\.patience: unknown key, known here: name, speed"),
        ("parts.0.lable=x", r"parts\.0\.lable: unknown key, did you mean label\?"),
        ("spare.wait=x", r"spare\.weight: missing; spare\.wait: unknown key"),
        ("zzz=1", "zzz: unknown key, known here: engine, parts, ratio, spare, title"),
        ("ratio=2", "ratio: Input should be less than or equal to 1, got 2"),
        ("engine.speed=0", r"engine\.speed: Input should be greater than 0, got 0"),
        ("engine.name=warp", r"engine: Input tag 'warp'.*'slow', 'fast'"),
        ("engine={speed: 3}", r"engine\.name: missing"),
        ("engine=fast", "engine: Input should be a valid dictionary.*got 'fast'"),
        ("parts.0.weight=heavy", r"parts\.0\.weight: .*got 'heavy'"),
        ("title=bad", "machine.yaml: title is bad; choose another"),
        ("title=null", "title: Input should be a valid string, got None"),
    ],
)
def test_every_bad_key_is_named_as_it_was_written(file, override, says):
    with pytest.raises(ConfigError, match=says) as refused:
        load_yaml_config(Machine, file, [override])
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_list_of_bad_items_is_not_called_short_too():
    class Team(Frozen):
        roles: Annotated[tuple[Literal["read", "write"], ...], Field(min_length=1)]

    with pytest.raises(ConfigError, match="got 'raed'") as refused:
        validate_config(Team, {"roles": ["raed"]}, where="here")
    assert str(refused.value) == "here: roles.0: Input should be 'read' or 'write', got 'raed'."
    with pytest.raises(ConfigError, match="roles: Tuple should have at least 1 item"):
        validate_config(Team, {"roles": []}, where="here")


def test_a_question_ends_with_its_mark(file):
    with pytest.raises(ConfigError, match=r"did you mean title\?$"):
        load_yaml_config(Machine, file, ["titel=x"])


def test_a_key_that_is_missing_is_named():
    with pytest.raises(ConfigError, match="here: title: missing; engine: missing"):
        validate_config(Machine, {}, where="here")


def test_many_bad_keys_are_counted_instead_of_listed():
    document = {f"key{number}": 1 for number in range(20)}
    with pytest.raises(ConfigError, match="; and 14 more"):
        validate_config(Machine, document, where="here")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "contains nothing instead of `key: value` lines"),
        (b"[1, 2]", "contains a list"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a: [", "machine.yaml line 1"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(file, content, says):
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        load_yaml_config(Machine, file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nope\.yaml: No such file"):
        load_yaml_config(Machine, tmp_path / "nope.yaml")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("8:16", "8:16"),
        ("1e-4", 1e-4),
        ("-2.5E3", -2500.0),
        (".5", 0.5),
        ("012", 12),
        ("+7", 7),
        ("0x10", 16),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("2026-01-01", "2026-01-01"),
        ("-.inf", -math.inf),
        ("'8'", "8"),
        ("[1, a, {b: 2}]", [1, "a", {"b": 2}]),
    ],
)
def test_a_yaml_scalar_has_the_type_of_the_core_schema(text, meant):
    found = parse_yaml(text, where="here")
    assert found == meant
    assert type(found) is type(meant)


def test_merge_keys_still_merge_and_may_be_overridden():
    text = "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}"
    assert parse_yaml(text, where="here")["more"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", r"here line 3, column 1: not YAML: .*duplicate key .a."),
        ("a: {b: 1, b: 2}", "line 1, column 11.*duplicate key .b."),
        ("a: [1,\nb: 2", "here line 2, column 5: not YAML: .*expected ',' or ']'"),
        ("a:\n\t- 1", "line 2, column 1"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
        ("[" * 1500, "not YAML"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_place_in_one_line(text, says):
    with pytest.raises(ConfigError, match=says) as refused:
        parse_yaml(text, where="here")
    assert "\n" not in str(refused.value)


class Places(Frozen):
    out: Annotated[str, Field(min_length=1), EXPANDED]
    label: str = "x"


@pytest.mark.parametrize(
    ("written", "expanded"),
    [
        ("~", "/home/ann"),
        ("~/x", "/home/ann/x"),
        ("~/$RUNS/x", "/home/ann/r/1/x"),
        ("/a/${RUNS}x/$RUNS", "/a/r/1x/r/1"),
        ("$ODD/x", "~/$NOWHERE/x"),  # contents of a variable are not expanded again
        ("./~x", "./~x"),
        ("a~/b", "a~/b"),
        ("a$/$5", "a$/$5"),
        ("runs/a", "runs/a"),
        ("s3://bucket/$NOWHERE/~", "s3://bucket/$NOWHERE/~"),
        ("http://host:1/v1/caches/$NOWHERE", "http://host:1/v1/caches/$NOWHERE"),
    ],
)
def test_a_path_is_expanded_as_on_a_command_line(monkeypatch, written, expanded):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("RUNS", "r/1")
    monkeypatch.setenv("ODD", "~/$NOWHERE")
    monkeypatch.delenv("NOWHERE", raising=False)
    document = {"out": written, "label": written}
    read = validate_config(Places, document, where="f.yaml")
    assert read == Places.model_validate({"out": expanded, "label": written})


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("$NOWHERE/x", "the environment variable 'NOWHERE' in '$NOWHERE/x' is not set"),
        ("~/${NOWHERE}", "the environment variable 'NOWHERE' in '~/${NOWHERE}' is not set"),
        ("${}", "the environment variable '' in '${}' is not set"),
        ("~nobody-of-that-name/x", "no home folder is known for ~nobody-of-that-name"),
    ],
)
def test_a_path_that_cannot_be_expanded_is_refused_by_key_in_one_line(monkeypatch, written, says):
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(ConfigError, match=re.escape(f"f.yaml: out: {says}")) as refused:
        validate_config(Places, {"out": written}, where="f.yaml")
    assert "\n" not in str(refused.value)


def test_a_path_in_a_stored_document_is_taken_literally():
    assert Places.model_validate({"out": "~/$NOWHERE"}).out == "~/$NOWHERE"
