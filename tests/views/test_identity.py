"""What is said and accepted when a replayed view is not the recorded one."""

from __future__ import annotations

import re

import numpy as np
import pytest

from cache_service.views.identity import (
    WitnessDiff,
    accepts_drift,
    compare_views,
    explain_drift,
    library_versions,
)

OLD = {"pillow": "12.0.0", "torchvision": "0.29.1"}
NEW = {"pillow": "13.0.0", "torchvision": "0.29.1"}
SLIGHT = [WitnessDiff(0, 0.0), WitnessDiff(3, 0.009)]


def test_rounding_is_called_rounding_and_names_the_library():
    assert explain_drift(OLD, NEW, SLIGHT) == (
        "rounding (at most 3 levels in 0.9 % of pixels); "
        "pillow was 12.0.0 at recording and is 13.0.0 here"
    )


def test_another_crop_is_never_called_rounding():
    said = explain_drift(OLD, OLD, [WitnessDiff(9, 0.5), WitnessDiff(201, 0.97)])
    assert said.startswith("another crop or other pixels, not rounding (at most 201 levels in 97.0")
    assert said.endswith("no library that renders views changed")


@pytest.mark.parametrize(
    ("diffs", "says"),
    [
        ([], "there is no witness to compare with"),
        ([WitnessDiff(0, 0.0)], "the witnesses are replayed exactly"),
        ([WitnessDiff(1, 0.0001)], r"rounding \(at most 1 level in under 0.1 % of pixels\)"),
        ([WitnessDiff(8, 0.1)], "^rounding"),
        ([WitnessDiff(9, 0.1)], "^another crop"),
    ],
)
def test_the_size_of_the_difference_chooses_the_words(diffs, says):
    assert re.search(says, explain_drift(OLD, NEW, diffs))


def test_a_library_on_one_side_only_is_named():
    said = explain_drift({"pillow": "13.0.0"}, {"pillow": "13.0.0", "zlib": "1.3"}, SLIGHT)
    assert said.endswith("zlib was absent at recording and is 1.3 here")


@pytest.mark.parametrize(
    ("origins_equal", "diffs", "max_drift", "accepted"),
    [
        (True, SLIGHT, 3, True),
        (True, SLIGHT, 2, False),
        (False, SLIGHT, 255, False),
        (True, [], 255, False),
        (True, [WitnessDiff(0, 0.0)], 0, True),
    ],
)
def test_drift_is_accepted_only_with_equal_origins_and_small_witnesses(
    origins_equal, diffs, max_drift, accepted
):
    answer = accepts_drift(origins_equal=origins_equal, witness_diffs=diffs, max_drift=max_drift)
    assert answer is accepted


def test_views_are_compared_by_their_largest_step_and_the_pixels_it_touches():
    recorded = np.full((4, 5, 3), 250, dtype=np.uint8)
    replayed = recorded.copy()
    replayed[0, 0, 1] = 255
    replayed[3, 2] = [249, 251, 250]
    assert compare_views(recorded, replayed) == WitnessDiff(5, 2 / 20)
    assert compare_views(replayed, recorded) == WitnessDiff(5, 2 / 20)
    assert compare_views(recorded, recorded) == WitnessDiff(0, 0.0)


def test_versions_are_plain_strings_of_every_library_that_can_change_a_pixel():
    versions = library_versions()
    assert {"pillow", "torchvision", "torch", "numpy", "libjpeg", "zlib"} <= versions.keys()
    assert list(versions) == sorted(versions)
    assert all(v and "+" not in v for v in versions.values())
