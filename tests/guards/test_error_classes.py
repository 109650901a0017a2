"""The family of errors: stable codes, and safe to send home from a worker process."""

from __future__ import annotations

import pickle

import pytest

from cache_service import errors

KINDS = [
    each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, errors.KdCacheError)
]

FROZEN = {
    "config": (422, 2),
    "corrupt": (500, 3),
    "dataset": (422, 2),
    "error": (500, 1),
    "non_finite": (500, 3),
    "not_a_cache": (404, 2),
    "out_of_space": (507, 4),
    "rows_not_built": (404, 4),
    "spec_mismatch": (409, 3),
    "storage": (503, 1),
    "unreadable_sample": (500, 3),
    "unsupported": (422, 2),
    "untrained_teacher": (409, 3),
    "view_drift": (409, 3),
    "workers": (500, 4),
}
"""Code: HTTP status and exit code, which scripts and services rely on."""


def test_codes_statuses_and_exit_codes_are_stable():
    assert {kind.code: (kind.http_status, kind.exit_code) for kind in KINDS} == FROZEN
    assert len(KINDS) == len(FROZEN)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.code)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_the_trip_out_of_a_worker(kind, protocol):
    sent = kind("seed 5 is not recorded.", hint="Record it.")
    back = pickle.loads(pickle.dumps(sent, protocol))
    assert type(back) is kind
    assert (back.message, back.hint, str(back)) == (sent.message, sent.hint, str(sent))
    assert str(back) == "seed 5 is not recorded. Record it."


def test_an_error_without_a_hint_is_its_message():
    assert str(errors.ConfigError("no.")) == "no."
