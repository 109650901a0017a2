"""YAML as people mean it: the core schema of 1.2, without double keys."""

from __future__ import annotations

import math

import pytest

from cache_service.errors import ConfigError
from cache_service.yamltext import parse_yaml


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("8:16", "8:16"),
        ("1e-4", 1e-4),
        ("-2.5E3", -2500.0),
        (".5", 0.5),
        ("012", 12),
        ("+7", 7),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
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
def test_a_scalar_is_what_it_looks_like(text, meant):
    found = parse_yaml(text, where="here")
    assert found == meant
    assert type(found) is type(meant)


def test_merge_keys_still_merge_and_may_be_overridden():
    text = "base: &base {a: 1, b: 2}\nmore: {<<: *base, b: 3}"
    assert parse_yaml(text, where="here")["more"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", r"here line 3, column 1: not YAML: key 'a' is there twice\."),
        ("a: {b: 1, b: 2}", "line 1, column 11.*'b' is there twice"),
        ("a: [1,\nb: 2", "here line 2, column 5: not YAML: .*expected ',' or ']'"),
        ("a:\n\t- 1", "line 2, column 1"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
        ("[" * 1500, "not YAML"),
        ("? [a]\n: b", "not YAML: .*unhashable key"),
    ],
)
def test_what_is_no_yaml_is_refused_with_its_place_in_one_line(text, says):
    with pytest.raises(ConfigError, match=says) as refused:
        parse_yaml(text, where="here")
    assert "\n" not in str(refused.value)
