"""A teacher whose answers are not repeatable, or not those that are recorded, records nothing."""

from __future__ import annotations

import pytest
from support import stateful
from support.builds import open_toy, record_toy, run_build, tree_bytes

from cache_service.errors import SpecMismatchError, UnsupportedError, ViewDriftError
from cache_service.recording import comparison
from cache_service.recording.engines import prepare
from cache_service.recording.plan import make_plan

CODECS = [{"kind": "dense"}, {"kind": "int8"}, {"kind": "topk", "k": 3}, {"kind": "features"}]


def open_doubtful(path, name, **changes):
    return open_toy(str(path), teacher__model=f"support.doubtful:{name}", scales=[1], **changes)


@pytest.mark.parametrize("use", [prepare, make_plan], ids=["build", "plan"])
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("dropped", r"answered the same 64 views differently .* dropout"),
        ("sampled", r"answered the same 64 views differently .* sampling"),
        ("centered", r"by what else is in its batch: the same 64 views .* batch statistics"),
        (
            "training_member",
            r"by what else is in its batch: .* eval\(\) on networks",
        ),
    ],
)
def test_answers_that_are_not_repeatable_are_refused_before_a_row_is_paid_for(
    tmp_path, name, says, use
):
    with pytest.raises(UnsupportedError, match=says) as refusal:
        use(open_doubtful(tmp_path / "c", name))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("name", ["lazy", "member", "disguised"])
def test_repeatable_teachers_pass_and_resume(tmp_path, name):
    run_build(open_doubtful(tmp_path / "c", name, seeds="0:1"))
    run_build(open_doubtful(tmp_path / "c", name, seeds="0:2"))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_small_batches_are_checked_too(tmp_path, batch_size):
    open_and_check = open_doubtful(tmp_path / "a", "lazy", batch_size=batch_size)
    prepare(open_and_check)
    with pytest.raises(UnsupportedError, match="differently"):
        prepare(open_doubtful(tmp_path / "b", "sampled", batch_size=batch_size))


def test_another_network_of_a_hidden_list_is_another_teacher(tmp_path, monkeypatch):
    run_build(open_doubtful(tmp_path / "c", "member", seeds="0:1"))
    monkeypatch.setenv("TEACHER_SCALE", "-9")
    with pytest.raises(SpecMismatchError, match=r"teacher\.weights_sha256"):
        run_build(open_doubtful(tmp_path / "c", "member", seeds="0:2"))


def test_a_teacher_without_tensors_is_recorded_only_under_a_digest_of_its_own(
    tmp_path, monkeypatch
):
    with pytest.raises(UnsupportedError, match="attribute weights_digest"):
        open_doubtful(tmp_path / "c", "session")
    run_build(open_doubtful(tmp_path / "c", "named_session", seeds="0:1"))
    monkeypatch.setenv("TEACHER_GAIN", "-9")
    with pytest.raises(SpecMismatchError, match=r"teacher\.weights_sha256"):
        run_build(open_doubtful(tmp_path / "c", "named_session", seeds="0:2"))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec["kind"])
def test_recorded_views_are_asked_for_again_before_every_resume(tmp_path, codec):
    changes = {"codec": codec, "seeds": "0:1"}
    record_toy(str(tmp_path / "c"), **changes)
    prepare(open_toy(str(tmp_path / "c"), **changes | {"seeds": "0:2"}))


@pytest.mark.parametrize("gain", ["1.1", "-1", "3"])
@pytest.mark.parametrize("codec", CODECS[:3], ids=lambda codec: codec["kind"])
def test_a_resume_by_another_teacher_of_the_same_digest_is_refused(
    tmp_path, monkeypatch, gain, codec
):
    run_build(open_doubtful(tmp_path / "c", "disguised", seeds="0:1", codec=codec))
    before = tree_bytes(tmp_path / "c")
    monkeypatch.setenv("TEACHER_GAIN", gain)
    for use in (prepare, make_plan):
        with pytest.raises(SpecMismatchError, match=r"does not answer recorded views") as refusal:
            use(open_doubtful(tmp_path / "c", "disguised", seeds="0:2", codec=codec))
        assert "give the build another `cache:` path" in refusal.value.hint
        assert "\n" not in str(refusal.value)
    assert tree_bytes(tmp_path / "c") == before


def test_a_finished_build_asks_its_teacher_nothing(tmp_path, monkeypatch):
    run_build(open_doubtful(tmp_path / "c", "disguised"))
    monkeypatch.setenv("TEACHER_GAIN", "3")
    run_build(open_doubtful(tmp_path / "c", "disguised"))


def test_a_damaged_shard_says_nothing_of_the_teacher(tmp_path):
    record_toy(str(tmp_path / "c"), seeds="0:1")
    file = tmp_path / "c" / "witness" / "c" / "0" / "0" / "0" / "0" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[9] ^= 1
    file.write_bytes(content)
    prepare(open_toy(str(tmp_path / "c"), seeds="0:2"))


def test_averaged_weights_are_named_by_plan_and_build(tmp_path):
    import torch
    from support.toys import tiny_net

    raw, averaged = tiny_net(scale=1.0).state_dict(), tiny_net().state_dict()
    torch.save({"state_dict": raw, "state_dict_ema": averaged}, tmp_path / "best.pth")
    changes = {
        "teacher__checkpoint": str(tmp_path / "best.pth"),
        "teacher__checkpoint_weights": "averaged",
    }
    build = open_toy(str(tmp_path / "c"), **changes)
    lines = []
    prepare(build, on_message=lines.append)
    told = "averaged weights, state_dict_ema of best.pth"
    assert lines[0] == f"teacher: support.toys:tiny_net, {told}"
    assert make_plan(build).teacher_weights == told
    assert build.spec == open_toy(str(tmp_path / "d")).spec
    assert build.provenance["teacher"]["checkpoint_weights"] == "averaged"
    assert "checkpoint_key" not in build.provenance["teacher"]
    del changes["teacher__checkpoint_weights"]
    named = open_toy(str(tmp_path / "c"), **changes, teacher__checkpoint_key="state_dict_ema")
    assert named.spec == build.spec
    assert named.provenance["teacher"]["checkpoint_key"] == "state_dict_ema"
    assert "checkpoint_weights" not in named.provenance["teacher"]


def open_stateful(path, name, **changes):
    return open_toy(
        str(path), augment={"callable": f"support.stateful:{name}", "size": 24}, **changes
    )


@pytest.mark.parametrize("use", [prepare, make_plan], ids=["build", "plan"])
def test_a_pipeline_that_cannot_be_replayed_is_refused_before_the_teacher_is_asked(
    tmp_path, monkeypatch, use
):
    build = open_stateful(tmp_path / "c", "numpy_closure")
    monkeypatch.setattr(type(build.teacher), "answer", lambda *_: pytest.fail("was asked"))
    with pytest.raises(UnsupportedError, match=r"cannot be replayed: .* \(numpy Generator\)"):
        use(build)
    assert not (tmp_path / "c").exists()


def test_an_edited_pipeline_does_not_continue_a_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "require_replayable", lambda *_: None)  # it takes seconds
    run_build(open_stateful(tmp_path / "c", "remembers", seeds="0:1"))
    run_build(open_stateful(tmp_path / "c", "remembers", seeds="0:2"))
    before = tree_bytes(tmp_path / "c")
    monkeypatch.setattr(stateful, "EDIT", 9)
    for use in (prepare, make_plan):
        with pytest.raises(ViewDriftError, match=r"does not render recorded views .* another crop"):
            use(open_stateful(tmp_path / "c", "remembers", seeds="0:3"))
    assert tree_bytes(tmp_path / "c") == before
