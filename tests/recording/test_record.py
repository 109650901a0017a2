"""What a build writes, and that it writes the same whatever happens around it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from support.builds import open_toy, record_toy, run_build, tree_bytes

from cache_service.errors import (
    NonFiniteError,
    SpecMismatchError,
    UntrainedTeacherError,
)
from cache_service.format.cells import expand_cells
from cache_service.recording.build_config import BuildConfig
from cache_service.recording.context import open_build
from cache_service.recording.engines import prepare
from cache_service.recording.plan import describe_reuse, make_plan
from cache_service.recording.record import open_writer, record
from cache_service.recording.shards import Part
from cache_service.rows.reader import open_cache

CODECS = [
    {"kind": "dense"},
    {"kind": "int8", "compression": "zstd"},
    {"kind": "topk", "k": 3},
    {"kind": "features"},
]


@pytest.mark.parametrize("codec", CODECS, ids=lambda c: c["kind"])
def test_recorded_rows_are_the_teachers_answers_to_the_recorded_views(tmp_path, codec):
    build = open_toy(str(tmp_path / "c"), codec=codec)
    cache = run_build(build)
    for seed in build.config.seeds:
        positions = np.arange(96)
        views = build.views.render(seed, positions)
        rows = cache.read(seed, 0, 96)
        np.testing.assert_array_equal(rows["sample"], views.samples_B)
        np.testing.assert_array_equal(rows["digest"], views.digests_B)
        np.testing.assert_array_equal(rows["origin"], views.origins_B)
        stored = cache.spec.decode(rows, head=cache.head())
        live = build.teacher.answer(torch.from_numpy(views.pixels_BHW3))
        if codec["kind"] == "topk":
            kept = rows["classes"].astype(np.int64)
            stored = np.take_along_axis(stored, kept, -1)
            live = np.take_along_axis(live, kept, -1)
        spread = float(live.max() - live.min())
        tolerance = spread / 255 if codec["kind"] == "int8" else 2e-3 * spread
        np.testing.assert_allclose(stored, live, atol=tolerance)


def test_nested_scales_store_the_finest_grid_and_cell_zero_is_the_teachers_logit(tmp_path):
    build = open_toy(str(tmp_path / "c"), scales=[1, 2, 4])
    assert build.spec.stored_scales == (4,)
    cache = run_build(build)
    views = build.views.render(0, np.arange(32))
    stored = cache.spec.decode(cache.read(0, 0, 32), head=None)
    cells = expand_cells(stored, cache.spec.scales, cache.spec.stored_scales)
    plain = open_toy(str(tmp_path / "d"), scales=[1])
    whole = plain.teacher.answer(torch.from_numpy(views.pixels_BHW3))
    np.testing.assert_allclose(cells[:, 0], whole[:, 0], atol=5e-3)


def test_witnesses_are_whole_recorded_views(tmp_path):

    build = open_toy(str(tmp_path / "c"))
    cache = run_build(build)
    for shard in range(3):
        views = build.views.render(1, cache.layout.witness_positions(shard))
        np.testing.assert_array_equal(cache.witnesses(1, shard), views.pixels_BHW3)


def test_parts_and_processes_and_seed_order_give_the_same_bytes(tmp_path):
    record_toy(str(tmp_path / "whole"))
    build = open_toy(str(tmp_path / "parts"))
    for index in (2, 0, 1):
        run_build(build, part=Part(index, 3))
    seeds = open_toy(str(tmp_path / "seeds"))
    run_build(seeds, seeds=(1,))
    run_build(seeds, seeds=(0,))
    whole = tree_bytes(tmp_path / "whole")
    assert tree_bytes(tmp_path / "parts") == whole
    assert tree_bytes(tmp_path / "seeds") == whole


def test_a_finished_build_records_nothing_again(tmp_path):
    build = open_toy(str(tmp_path / "c"))
    run_build(build)
    before = tree_bytes(tmp_path / "c")
    assert record(build, open_writer(build), seeds=build.config.seeds) == 0
    assert tree_bytes(tmp_path / "c") == before


def test_adding_seeds_later_extends_the_cache_and_leaves_the_rest(tmp_path):
    first = record_toy(str(tmp_path / "c"), seeds="0:1")
    rows = first.read(0, 0, 96)
    shard_files = {k: v for k, v in tree_bytes(tmp_path / "c").items() if "/c/0/" in k}
    extended = record_toy(str(tmp_path / "c"), seeds="0:3")
    assert extended.complete_seeds() == [0, 1, 2]
    assert extended.fingerprint == first.fingerprint
    for name, values in rows.items():
        np.testing.assert_array_equal(extended.read(0, 0, 96)[name], values)
    after = tree_bytes(tmp_path / "c")
    assert {name: after[name] for name in shard_files} == shard_files


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"teacher__model_args": {"scale": 19.0}}, "teacher"),
        ({"augment": {"preset": "none", "size": 16}}, "recipe.ops"),
        ({"augment": {"preset": "cifar", "size": 20}}, "recipe.size"),
        ({"dataset__args": {"num_samples": 96, "salt": 1}}, "dataset.sha256"),
        ({"codec": {"kind": "int8"}}, "codec.kind"),
        ({"scales": [1]}, "scales"),
        ({"layout": {"shard_rows": 16, "chunk_rows": 8}}, "layout.shard_rows"),
    ],
)
def test_a_changed_build_against_an_existing_cache_is_refused_by_field(tmp_path, change, field):
    record_toy(str(tmp_path / "c"), seeds="0:1")
    before = tree_bytes(tmp_path / "c")
    with pytest.raises(SpecMismatchError, match=field) as refusal:
        record_toy(str(tmp_path / "c"), seeds="0:1", **change)
    assert "was recorded with" in str(refusal.value)
    assert "but this build has" in str(refusal.value)
    assert tree_bytes(tmp_path / "c") == before


def test_an_untrained_teacher_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UntrainedTeacherError, match="where guessing gives"):
        record_toy(str(tmp_path / "c"), teacher__allow_untrained=False)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("order", [None, "natural"])
def test_folders_of_numbers_under_a_teacher_of_numbers_are_refused_or_read_in_its_order(
    tmp_path, order
):
    for label in range(30):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        for blue in range(3):
            image = PIL.Image.new("RGB", (16, 16), (8 * label, 8 * label, 60 * blue))
            image.save(tmp_path / "images" / str(label) / f"{blue}.png")
    config = BuildConfig.model_validate(
        {
            "cache": str(tmp_path / "c"),
            "dataset": {"name": "folder", "root": str(tmp_path / "images"), "classes": order},
            "augment": {"preset": "none", "size": 16},
            "seeds": "0:1",
            "teacher": {"model": "support.toys:levels", "mean": [0, 0, 0], "std": [1, 1, 1]},
        }
    )
    build = open_build(config)
    if order is None:
        assert build.score().accuracy >= build.score().needed
        with pytest.raises(UntrainedTeacherError, match="names in natural order") as refusal:
            prepare(build)
        assert "dataset.classes: natural" in str(refusal.value)
        assert not (tmp_path / "c").exists()
        assert "natural order" in make_plan(build).class_order
    else:
        prepare(build)
        assert make_plan(build).class_order == ""


def levels_build(folder, reds, **teacher):
    """Grey images, four a class, under a network that answers class n for red value 8 n."""
    for label, red in enumerate(reds):
        (folder / "images" / f"class{label}").mkdir(parents=True)
        for blue in range(4):
            image = PIL.Image.new("RGB", (16, 16), (red[blue % len(red)], 0, 60 * blue))
            image.save(folder / "images" / f"class{label}" / f"{blue}.png")
    document = {
        "cache": str(folder / "c"),
        "dataset": {"name": "folder", "root": str(folder / "images")},
        "augment": {"preset": "none", "size": 16},
        "seeds": "0:1",
        "teacher": {
            "model": "support.toys:levels",
            "mean": [0, 0, 0],
            "std": [1, 1, 1],
            "num_classes": 5,
            **teacher,
        },
    }
    return open_build(BuildConfig.model_validate(document))


def test_outputs_of_a_wider_teacher_are_taken_where_the_views_leave_no_doubt_and_it_is_said(
    tmp_path,
):
    build, told = levels_build(tmp_path, [[32], [8], [24]]), []
    assert build.spec.teacher.classes == (4, 1, 3)
    prepare(build, on_message=told.append)
    assert "outputs [4, 1, 3] are taken as the dataset's classes" in " ".join(told)
    assert build.score().accuracy == 1.0
    named = levels_build(tmp_path / "named", [[32], [8], [24]], classes=[4, 1, 3])
    assert named.spec.teacher == build.spec.teacher
    assert build.provenance["teacher"]["classes"] == [4, 1, 3]


@pytest.mark.parametrize(
    ("reds", "teacher", "why"),
    [
        ([[0], [8], [16]], {}, "the first outputs are right"),
        ([[32, 24], [8], [24, 32]], {}, "two classes share their outputs"),
        ([[32, 0], [8], [24]], {}, "half of a class is another output"),
        ([[32], [8], [24]], {"allow_untrained": True}, "an untrained teacher is asked for"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_outputs_of_a_wider_teacher_are_not_taken_otherwise(tmp_path, reds, teacher, why):
    build = levels_build(tmp_path, reds, **teacher)
    assert build.spec.teacher.classes is None, why
    assert build.notes == ()


def test_a_teacher_that_answers_nan_stops_the_build_and_names_samples(tmp_path):
    with pytest.raises(NonFiniteError, match=r"seed 0, positions \[0, 16\), samples \["):
        record_toy(str(tmp_path / "c"), teacher__model_args={"scale": 1e7})
    assert open_cache(str(tmp_path / "c")).commits() == {}


def test_mixing_recipes_record_partners_and_survive_odd_batches(tmp_path):
    augment = {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}, {"op": "cutmix"}]}
    one = record_toy(str(tmp_path / "a"), augment=augment, seeds="0:1", batch_size=16)
    other = record_toy(str(tmp_path / "b"), augment=augment, seeds="0:1", batch_size=7)
    np.testing.assert_array_equal(one.read(0, 0, 96)["digest"], other.read(0, 0, 96)["digest"])


def test_an_interrupted_build_tells_of_every_shard_that_it_committed(tmp_path):
    build = open_toy(str(tmp_path / "c"), seeds="0:3")
    prepare(build)
    writer, told = open_writer(build), []

    def interrupt(progress):
        told.append(progress)
        if len(told) == 6:  # 2 batches a shard: the second one is being written, the third answered
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        record(build, writer, seeds=(0, 1, 2), on_progress=interrupt)
    committed = sum(len(shards) for shards in open_cache(str(tmp_path / "c")).commits().values())
    assert committed == told[-1].shards_committed == 2


def test_no_scratch_is_left_behind(tmp_path):
    record_toy(str(tmp_path / "c"))
    assert not [p for p in Path(tmp_path / "c").rglob("*") if "scratch" in p.name]


@pytest.mark.parametrize(
    ("num_seeds", "repeats", "says"),
    [
        (1, 1, "1 epoch of new views; a longer run reads them again in other batches; 5 seeds"),
        (30, 1, "30 epochs of new views"),
        (3, 4, "they visit 3 of 4 parts of the images: record 4 seeds or a multiple"),
        (6, 4, "some images are visited once more than others: record a multiple of 4 seeds"),
    ],
)
def test_a_plan_says_how_far_the_seeds_go(num_seeds, repeats, says):
    assert says in describe_reuse(num_seeds, repeats)


def test_a_multiple_of_the_repeats_needs_no_advice():
    assert "repeats" not in describe_reuse(8, 4)
    assert "multiple" not in describe_reuse(2, 2)
