"""The page about scale says what the code that lays out caches says."""

from __future__ import annotations

import pytest
from support.pages import ROOT

from cache_service.format.layout import CacheLayout
from cache_service.format.spec import Layout
from cache_service.recording.plan import seed_bytes
from docs import scale

PAGE = (ROOT / "docs" / "scale.md").read_text()
IN1K, IN21K = scale.PROJECTS


def total_gb(layout: CacheLayout) -> int:
    return round(IN21K.num_seeds * seed_bytes(layout, scale.STORED_VIEW_BYTES) / 1e9)


def test_bytes_in_the_text_are_those_of_the_code():
    sizes = [total_gb(scale.layout_of(IN21K, scale.CODECS[f"topk {k}"])) for k in (50, 10)]
    assert f"`topk 50` takes {sizes[0]} GB and `topk 10` {sizes[1]}," in PAGE
    spec = scale.layout_of(IN21K, scale.CODECS["topk 10"]).spec
    larger = Layout(shard_rows=65536, chunk_rows=4096)
    assert f"to {total_gb(CacheLayout(spec.model_copy(update={'layout': larger})))} GB" in PAGE


@pytest.mark.parametrize(("project", "codec", "row_bytes"), [
    (IN1K, "dense", 2 * 1_000 + 20),
    (IN21K, "dense", 2 * 21_841 + 20),
    (IN21K, "int8", 21_841 + 8 + 20),
    (IN21K, "features 1024", 2 * 1_024 + 20),
])  # fmt: skip
def test_rows_have_the_bytes_of_their_answer_and_twenty_more(project, codec, row_bytes):
    assert scale.layout_of(project, scale.CODECS[codec]).row_bytes == row_bytes
    assert f"{project.title}, {codec} | {row_bytes:,} |" in PAGE


def test_hours_follow_from_views_and_rates():
    views = 1_281_167 * 300
    assert f"| {views / 360 / 3600:,.0f} |" in PAGE
    assert f"{views / 2000 / 3600:,.0f} h, 6" in PAGE
