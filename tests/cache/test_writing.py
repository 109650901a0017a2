"""Recording: once, by one, in full; and a full disk or a rival loses nothing."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from support import s3
from support.caches import (
    VERSIONS,
    make_head,
    make_rows,
    make_spec,
    make_witnesses,
    open_writer,
    write_cache,
    write_shard,
)
from support.disks import small_disk
from support.everything import Expected, files_of, outcome, shard_outcomes
from support.storages import RecordingStorage

from cache_service.errors import ConfigError, CorruptError, OutOfSpaceError, SpecMismatchError
from cache_service.rows.reader import open_cache
from cache_service.rows.writer import create_cache
from cache_service.storage import open_storage

SPEC = make_spec()


def tree(root):
    return {path.relative_to(root): path.read_bytes() for path in files_of(root)}


# --- the same bytes --------------------------------------------------------------------------


def test_recording_the_same_twice_gives_the_same_files(tmp_path):
    for name in ("one", "two"):
        write_cache(str(tmp_path / name), SPEC, range(2))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_the_order_in_which_shards_are_recorded_leaves_no_trace(tmp_path):
    write_cache(str(tmp_path / "forward"), SPEC, range(2))
    writer = open_writer(str(tmp_path / "backward"), SPEC, 1)
    writer = open_writer(str(tmp_path / "backward"), SPEC, 2)
    for seed in (1, 0):
        for shard in reversed(range(SPEC.num_shards)):
            write_shard(writer, seed, shard)
    writer.storage.sweep()
    assert tree(tmp_path / "forward") == tree(tmp_path / "backward")


def test_a_bucket_holds_the_same_objects_as_a_folder(tmp_path, monkeypatch):
    for name, value in s3.moto_environment().items():
        monkeypatch.setenv(name, value)
    url = s3.new_prefix()
    write_cache(url, SPEC)
    write_cache(str(tmp_path), SPEC)
    bucket, folder = open_storage(url), open_storage(str(tmp_path))
    assert bucket.list("") == folder.list("")
    for key in folder.list(""):
        assert bucket.get(key) == folder.get(key), key


# --- once ------------------------------------------------------------------------------------


def test_a_committed_shard_is_not_written_again(tmp_path):
    storage = RecordingStorage(str(tmp_path))
    writer = open_writer(storage, SPEC)
    assert write_shard(writer, 0, 1) is True
    before = len(storage.operations)
    assert write_shard(writer, 0, 1, salt=5) is False, "not even with other rows"
    assert len(storage.operations) == before
    said = shard_outcomes(str(tmp_path), Expected(SPEC, 1))
    assert said[1] == "whole"


class Overtaken(RecordingStorage):
    """A folder in which another builder commits the shard just before we would."""

    def create(self, key, content):
        if key == "commits/0/1.json":
            write_shard(open_writer(self.url, SPEC), 0, 1, salt=5)
        return super().create(key, content)


def test_a_builder_that_was_overtaken_says_so_and_rows_are_never_mixed(tmp_path):
    # The rival's rows differ (another GPU, say), so its commit does not fit ours or ours not its.
    writer = open_writer(Overtaken(str(tmp_path)), SPEC)
    assert write_shard(writer, 0, 1) is False
    rival = Expected(SPEC, 1)
    rival.rows = [make_rows(SPEC, 5)]
    rival.witnesses = {(0, shard): make_witnesses(SPEC, 5, shard) for shard in range(4)}
    assert shard_outcomes(str(tmp_path), rival)[1] == "whole"


def test_a_builder_that_writes_into_a_shard_while_another_commits_it_makes_it_refused(tmp_path):
    class Mixing(RecordingStorage):
        """The rival writes everything but its commit between our last object and our commit."""

        def create(self, key, content):
            rival = RecordingStorage(str(tmp_path / "rival"))
            write_shard(open_writer(rival, SPEC), 0, 1, salt=5)
            for _, name, body in rival.operations:
                if "/c/0/1" in name and name.startswith("logits/"):
                    self.put(name, body)
            return super().create(key, content)

    root = tmp_path / "cache"
    storage = Mixing(str(root))
    open_writer(str(root), SPEC)
    writer = open_writer(storage, SPEC)
    assert write_shard(writer, 0, 1) is True
    said = shard_outcomes(str(root), Expected(SPEC, 1))[1]
    assert said.startswith("corrupt: ")
    assert "logits/c/0/1/0/0" in said


# --- full disks ------------------------------------------------------------------------------


def test_a_full_disk_stops_with_exit_code_4_and_the_same_build_resumes(tmp_path):
    spec = make_spec(num_samples=2048, num_classes=64, scales=(1,), shard_rows=256, chunk_rows=64)
    write_cache(str(tmp_path / "wanted"), spec)  # 8 shards of 38 kB, on a disk of another size
    with small_disk(tmp_path / "disk", "1m") as disk:
        ballast, root = disk / "ballast", disk / "cache"
        ballast.write_bytes(bytes(800_000))
        writer = open_writer(str(root), spec)
        done = []
        with pytest.raises(OutOfSpaceError, match="stays good") as refusal:  # noqa: PT012  one of 8
            for shard in range(spec.num_shards):
                write_shard(writer, 0, shard)
                done.append(shard)
        assert refusal.value.exit_code == 4
        assert 0 < len(done) < spec.num_shards
        assert not [path for path in files_of(root) if path.suffix == ".tmp"]
        said = shard_outcomes(str(root), Expected(spec, 1))
        assert said[: len(done)] == ["whole"] * len(done)
        assert all(words.startswith("rows_not_built: ") for words in said[len(done) :])

        ballast.unlink()
        writer = open_writer(str(root), spec)
        committed = [shard for shard in range(spec.num_shards) if write_shard(writer, 0, shard)]
        writer.storage.sweep()
        assert committed == [shard for shard in range(spec.num_shards) if shard not in done]
        assert tree(root) == tree(tmp_path / "wanted")


# --- an existing cache -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"weights": "b" * 64}, "teacher.weights_sha256"),
        ({"num_samples": 99}, "dataset.num_samples"),
        ({"codec": {"kind": "int8"}}, "codec.kind"),
        ({"size": 9}, "recipe.size"),
        ({"scales": (1, 4)}, "scales"),
        ({"chunk_rows": 16}, "layout.chunk_rows"),
    ],
)
def test_a_build_with_another_identity_is_refused_naming_the_field_and_both_values(
    tmp_path, changes, field
):
    write_cache(str(tmp_path), SPEC)
    before = tree(tmp_path)
    with pytest.raises(SpecMismatchError, match=f"this build has {field} = ") as refusal:
        open_writer(str(tmp_path), make_spec(**changes))
    said = refusal.value.message
    found = _at(SPEC.model_dump(mode="json"), field)
    wanted = _at(make_spec(**changes).model_dump(mode="json"), field)
    assert f"was recorded with {field} = {json.dumps(found)}" in said
    assert f"this build has {field} = {json.dumps(wanted)}" in said
    assert refusal.value.exit_code == 3
    assert tree(tmp_path) == before


def _at(document, path):
    for name in path.split("."):
        document = document[name]
    return document


def test_more_seeds_extend_the_arrays_and_fewer_never_shrink_them(tmp_path):
    write_cache(str(tmp_path), SPEC, range(1))
    open_writer(str(tmp_path), SPEC, 5)
    open_writer(str(tmp_path), SPEC, 2)
    assert zarr.open_group(tmp_path, mode="r")["logits"].shape[0] == 5
    assert outcome(str(tmp_path), Expected(SPEC, 1)) == "whole"


@pytest.mark.parametrize("key", ["logits/zarr.json", "commits/zarr.json", "head_bias/c/0"])
@pytest.mark.parametrize("damage", ["lost", "emptied", "foreign"])
def test_the_same_build_again_mends_what_is_beside_the_rows(tmp_path, key, damage):
    spec = make_spec(codec={"kind": "features", "num_channels": 6})
    write_cache(str(tmp_path), spec)
    key = key.replace("logits", "features")
    before = tree(tmp_path)
    path = tmp_path / key
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(b"" if damage == "emptied" else b'{"shape": [Infinity]}')
    open_writer(str(tmp_path), spec).storage.sweep()
    assert tree(tmp_path) == before


def test_a_damaged_root_document_is_not_built_upon(tmp_path):
    write_cache(str(tmp_path), SPEC)
    path = tmp_path / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"toy"', b'"t0y"', 1))
    with pytest.raises(CorruptError, match="its seal does not fit"):
        open_writer(str(tmp_path), SPEC)


def test_a_cache_too_wide_for_any_reader_is_not_begun(tmp_path):
    spec = make_spec(num_classes=2**24, scales=(1,), chunk_rows=16)
    with pytest.raises(ConfigError, match="one chunk of logits would hold"):
        open_writer(str(tmp_path), spec)
    assert files_of(tmp_path) == []


def test_what_the_library_versions_were_is_kept_with_the_shard_and_with_the_cache(tmp_path):
    write_cache(str(tmp_path), SPEC)
    cache = open_cache(str(tmp_path))
    assert cache.versions == VERSIONS
    assert cache.commit(0, 3).versions == VERSIONS


def test_provenance_comes_back_as_it_was_given(tmp_path):
    provenance = {"dataset": {"name": "folder", "root": "d"}, "teacher": {"model": "x", "seed": 1}}
    create_cache(
        open_storage(str(tmp_path)),
        SPEC,
        num_seeds=1,
        versions=VERSIONS,
        provenance=provenance,
        head=make_head(SPEC),
    )
    assert open_cache(str(tmp_path)).group.provenance == provenance


def test_a_row_of_the_wrong_type_or_length_is_a_bug_and_not_a_shard(tmp_path):
    writer = open_writer(str(tmp_path), SPEC)
    rows = {name: values[:32] for name, values in make_rows(SPEC, 0).items()}
    views = make_witnesses(SPEC, 0, 0)
    for name, wrong in (("sample", np.int64), ("logits", np.float32)):
        with pytest.raises(AssertionError, match=name):
            writer.write_shard(0, 0, rows | {name: rows[name].astype(wrong)}, views, VERSIONS)
    with pytest.raises(AssertionError, match="digest"):
        writer.write_shard(0, 0, rows | {"digest": rows["digest"][:31]}, views, VERSIONS)
    assert not writer.is_committed(0, 0)
