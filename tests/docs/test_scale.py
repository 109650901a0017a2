"""The page about scale says what the code that lays out caches says."""

from __future__ import annotations

import pytest
from support.pages import ROOT

from cache_service.format.codecs import TopKCodec
from cache_service.format.layout import CacheLayout
from cache_service.format.spec import CacheSpec, Layout
from cache_service.recording.plan import seed_bytes
from docs import scale

PAGE = (ROOT / "docs" / "scale.md").read_text()
IN1K, IN21K = scale.PROJECTS


def gigabytes(layout: CacheLayout) -> float:
    return IN21K.num_seeds * seed_bytes(layout, scale.STORED_VIEW_BYTES) / 1e9


def total_gb(layout: CacheLayout) -> int:
    return round(gigabytes(layout))


def larger_shards_gb(spec: CacheSpec) -> float:
    larger = Layout(shard_rows=65536, chunk_rows=4096)
    return gigabytes(CacheLayout(spec.model_copy(update={"layout": larger})))


def test_bytes_in_the_text_are_those_of_the_code():
    sizes = [total_gb(scale.layout_of(IN21K, scale.CODECS[f"topk {k}"])) for k in (50, 10)]
    assert f"`topk 50` takes {sizes[0]} GB and `topk 10` {sizes[1]}," in PAGE
    spec = scale.layout_of(IN21K, scale.CODECS["topk 10"]).spec
    assert f"to {round(larger_shards_gb(spec))} GB" in PAGE
    six = scale.layout_of(IN21K, {"kind": "topk", "k": 6}).spec
    seven = scale.layout_of(IN21K, {"kind": "topk", "k": 7}).spec
    assert f"({larger_shards_gb(six):.1f} GB; `k: 7` takes {larger_shards_gb(seven):.1f})" in PAGE


@pytest.mark.parametrize("classes", [1_000, 21_841])
def test_packed_pays_from_the_k_that_the_page_and_the_cookbook_name(classes):
    smaller = next(k for k in range(3, 256) if answer(k, classes, True) < answer(k, classes, False))
    assert smaller == {1_000: 3, 21_841: 42}[classes]
    assert "at 21,841 classes is smaller from `k: 42` on" in PAGE


def answer(k: int, classes: int, packed: bool) -> int:
    return sum(each.row_bytes for each in TopKCodec(k=k, packed=packed).arrays(1, classes))


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
