"""`kd-cache distill`: a folder of JPEG files, a teacher and a student, in one command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builds import tree_bytes
from support.command import kd_cache
from support.photos import write_photos

from cache_service.models.create import create_model
from cli.experiments.distill_folder.request import Request
from cli.experiments.distill_folder.run import run_distill
from distill.checkpoint import CHECKPOINT_NAME, load_checkpoint

NETWORKS = ("--teacher", "resnet8", "--student", "resnet8")
QUICK = (
    *("--train-teacher", "5", "--size", "16", "--epochs", "2", "--device", "cpu"),
    *("--set", "train.batch_size=8", "--set", "train.optimizer.lr=0.01"),
    *("--set", "train.workers=0", "--set", "build.workers=0"),
    *("--set", "augment.ops=[{op: pad_crop, padding: 1}]"),
)
REQUEST = Request(
    folder="",
    teacher="resnet8",
    student="resnet8",
    train_teacher=5,
    size=16,
    epochs=2,
    device="cpu",
    settings=tuple(QUICK[index + 1] for index, word in enumerate(QUICK) if word == "--set"),
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("user") / "photos")


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """The folder and the document of a run from start to end."""
    out = tmp_path_factory.mktemp("finished") / "out"
    ended = kd_cache("distill", str(photos), *NETWORKS, *QUICK, "--out", str(out), "--json")
    assert ended.code == 0, ended.err
    return out, json.loads(ended.out), ended.err


@pytest.fixture(scope="module")
def checkpoint(finished, tmp_path_factory):
    """Weights of a teacher of the photos, as a user has them."""
    path = tmp_path_factory.mktemp("weights") / "teacher.safetensors"
    return shutil.copy(finished[0] / "teachers/resnet8/student.safetensors", path)


def kept(out):
    """What costs time: shards, checkpoints, and weights."""
    files = tree_bytes(out).items()
    ends = (CHECKPOINT_NAME, ".safetensors")
    return {key: value for key, value in files if "/cache/" in key or key.endswith(ends)}


def rows_of(document):
    return {row["what"]: row for row in document["rows"]}


def test_the_table_compares_teacher_student_and_the_student_from_labels(finished):
    _, document, _ = finished
    rows = rows_of(document)
    assert list(rows) == ["teacher resnet8", "resnet8, kd", "resnet8, labels alone"]
    assert rows["teacher resnet8"]["mean"] > 60  # of three classes
    for row in rows.values():
        (run,) = row["runs"]
        assert run["failure"] is None
        assert 0 <= run["last"] <= 100


def test_both_students_learn_on_the_same_recorded_views(finished):
    out, _, _ = finished
    caches = [
        load_checkpoint(out / f"runs/resnet8/{name}/seed-0")["identity"]["caches"]
        for name in ("kd", "labels")
    ]
    assert caches[0] == caches[1]
    assert len(caches[0]) == 1


def test_the_cost_is_told_before_anything_is_paid_for(finished):
    _, document, err = finished
    lines = err.splitlines()
    first_paid = next(i for i, line in enumerate(lines) if line.startswith("kd-cache distill:"))
    told = "\n".join(lines[:first_paid])
    assert "72 in 3 classes to learn from, 18 for evaluation: 20 % of each class, chosen" in told
    assert "teacher  resnet8, to be trained first: 5 epochs in all, about " in told
    assert "record   2 epochs (0:2): 144 views, " in told
    assert "train    2 x resnet8: 4 epochs in all, about " in told
    recording = document["cost"]["recording"]
    assert recording["rows"] == recording["rows_pending"] == 144
    assert recording["num_bytes"] > 144 * 2 * 3  # three float16 logits and the identity of a view
    assert document["cost"]["training"]["seconds"] > 0


def test_report_and_weights_are_where_it_says(finished):
    out, document, _ = finished
    written = document["written"]
    report = out / "resnet8-from-resnet8.html"
    assert written["report"] == str(report)
    assert "teacher resnet8" in report.read_text()
    assert [Path(path).is_file() for path in written["students"]] == [True, True]


def test_the_same_command_again_computes_nothing(finished, photos):
    out, document, _ = finished
    before = kept(out)
    again = kd_cache("distill", str(photos), *NETWORKS, *QUICK, "--out", str(out), "--json")
    assert rows_of(json.loads(again.out)) == rows_of(document)
    assert kept(out) == before
    paid = [line for line in again.err.splitlines() if line.startswith("kd-cache distill:")]
    assert len(paid) == 3
    assert all(line.endswith("before") for line in paid)
    (line,) = [line for line in again.err.splitlines() if line.startswith("record ")]
    assert line.startswith("record   2 epochs (0:2): 144 views, ")
    assert line.endswith(" kB, recorded before")
    assert "train    2 x resnet8: trained before" in again.err


def test_the_files_it_leaves_run_by_hand_to_the_same_bytes(finished, tmp_path):
    out, document, _ = finished
    names = [Path(path).name for path in document["written"]["files"]]
    assert names == [
        "resnet8.teacher.yaml",
        "resnet8.build.yaml",
        "resnet8-kd.train.yaml",
        "resnet8-labels.train.yaml",
    ]
    before = kept(out)
    built = kd_cache("build", str(out / "resnet8.build.yaml"), "--json")
    assert json.loads(built.out)["shards_committed"] == 0
    trained = kd_cache("train", str(out / "resnet8-kd.train.yaml"), "--json")
    assert json.loads(trained.out)["evaluation"]["top1"] >= 0
    assert kept(out) == before
    cache = str(tmp_path / "cache")
    again = kd_cache("build", str(out / "resnet8.build.yaml"), "--set", f"cache={cache}")
    assert again.code == 0, again.err
    changes = ("--set", f"caches={cache}", "--set", f"out={tmp_path / 'run'}")
    by_hand = kd_cache("train", str(out / "resnet8-kd.train.yaml"), *changes)
    assert by_hand.code == 0, by_hand.err
    weights = (tmp_path / "run/student.safetensors").read_bytes()
    assert weights == (out / "runs/resnet8/kd/seed-0/student.safetensors").read_bytes()


def test_the_command_in_the_table_makes_the_same_table(finished, photos):
    out, document, _ = finished
    words = ("distill", str(photos), *NETWORKS, *QUICK, "--out", str(out))
    command = document["command"]
    for word in words:
        assert word in command
    assert "baseline" not in command


@pytest.mark.parametrize(
    "moment",
    ["teacher: epoch 2", "144 views recorded", "epoch 1 of 2: kd seed 0"],
    ids=["teacher", "recording", "student"],
)
def test_stopped_anywhere_and_run_again_it_has_the_same_figures(finished, photos, tmp_path, moment):
    out, document, _ = finished
    request = REQUEST._replace(folder=str(photos), out=str(tmp_path / "out"))
    seen = []

    def stop(line):
        seen.append(line)
        if moment in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_distill(request, dry_run=False, on_message=stop)
    messages = []
    resumed = run_distill(request, dry_run=False, on_message=messages.append)
    assert rows_of(resumed.table.document()).keys() == rows_of(document).keys()
    for name, row in rows_of(resumed.table.document()).items():
        assert [run["last"] for run in row["runs"]] == [
            run["last"] for run in rows_of(document)[name]["runs"]
        ]
    paid = [line for line in seen if line.startswith("kd-cache distill:")][:-1]
    repeated = [line for line in paid if line in messages and "epoch" in line]
    assert repeated == []
    weights = "runs/resnet8/kd/seed-0/student.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (out / weights).read_bytes()


def test_killed_while_it_trains_it_goes_on_with_the_same_command(finished, photos, tmp_path):
    out, _, _ = finished
    words = ("distill", str(photos), *NETWORKS, *QUICK, "--out", str(tmp_path / "out"))
    with subprocess.Popen(
        [sys.executable, "-c", "from cli.main import run; run()", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        text=True,
    ) as started:
        assert started.stderr is not None
        for line in started.stderr:
            if "epoch 3 of 5" in line:
                started.send_signal(signal.SIGKILL)
                break
        assert started.wait(timeout=60) == -signal.SIGKILL
    ended = kd_cache(*words)
    assert ended.code == 0, ended.err
    assert "epoch 1 of 5" not in ended.err
    weights = "runs/resnet8/kd/seed-0/student.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (out / weights).read_bytes()


def test_another_student_learns_from_the_same_recording(finished, photos, checkpoint, tmp_path):
    out, _, _ = finished
    shutil.copytree(out, tmp_path / "out")
    words = ("--teacher", "resnet8", "--student", "resnet14", "--epochs", "1", "--no-baseline")
    words += tuple(QUICK[i] for i in range(len(QUICK)) if QUICK[i] not in ("--epochs", "2"))
    ended = kd_cache(
        "distill", str(photos), *words, "--seeds", "2", "--out", str(tmp_path / "out"), "--json"
    )
    assert ended.code == 0, ended.err
    assert "recorded before" in ended.err
    assert "1 of them are not used by 1 training epochs" in ended.err
    assert list(rows_of(json.loads(ended.out))) == ["teacher resnet8", "resnet14, kd"]
    assert (tmp_path / "out/resnet8-from-resnet8.html").exists()
    assert (tmp_path / "out/resnet14-from-resnet8.html").exists()
    assert not (tmp_path / "out/resnet14-labels.train.yaml").exists()


GIVEN = ("--size", "16", "--epochs", "1", "--device", "cpu", "--set", "train.workers=0")


def distill(photos, tmp_path, *words, networks=NETWORKS):
    out = str(tmp_path / "out")
    return kd_cache("distill", str(photos), *networks, *GIVEN, "--out", out, *words)


def test_a_teacher_with_a_checkpoint_and_a_split_of_its_own(photos, checkpoint, tmp_path):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    write_photos(root / "valid", count=6)
    ended = distill(
        root, tmp_path, "--teacher-checkpoint", checkpoint, "--no-baseline", "--method", "dkd"
    )
    assert ended.code == 0, ended.err
    assert f"90 in 3 classes to learn from, 18 for evaluation: {root / 'valid'};" in ended.err
    assert "teacher  resnet8, teacher.safetensors" in ended.err
    lines = ended.out.splitlines()
    assert lines[2].startswith("| teacher resnet8 | ")
    assert lines[3].startswith("| resnet8, dkd | ")
    assert "labels" not in ended.out
    assert f"Report: {tmp_path / 'out/resnet8-from-resnet8.html'}" in lines


def test_a_dry_run_tells_the_cost_and_writes_nothing(photos, checkpoint, tmp_path):
    ended = distill(photos, tmp_path, "--teacher-checkpoint", checkpoint, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["cost"]["recording"]["rows_pending"] == 72
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--teacher", "resnt8", "--student", "resnet8"), "--teacher resnt8: there is no model"),
        (("--teacher", "resnet8", "--student", "rsnet8"), "Close to it: resnet8"),
        (("--teacher", "resnet8", "--student", "no.py:net"), "--student no.py:net"),
        (("--teacher", "torchvision/resnet19", "--student", "resnet8"), "torchvision/resnet1"),
        (NETWORKS, "--teacher resnet8 has no published weights. Give --teacher-checkpoint FILE"),
        (("--teacher", "resnet18.a9", "--student", "resnet8"), "no pretrained weights a9 for"),
        ((*NETWORKS, "--teacher-checkpoint", "no.pt"), "no file --teacher-checkpoint no.pt"),
        ((*NETWORKS, "--epochs", "0"), "--epochs 0 is not between 1 and 100000"),
        ((*NETWORKS, "--epochs", "100001"), "--epochs 100001 is not between 1 and 100000"),
        ((*NETWORKS, "--name", "a/b"), "--name a/b is not a name of a folder"),
        (("--teacher", "setup.py", "--student", "resnet8"), "--teacher setup.py: there is no"),
        (("--teacher", "tests", "--student", "resnet8"), "--teacher tests is a file or folder"),
        (("--teacher", "resnet8", "--student", "docs"), "--set student.checkpoint=FILE"),
        ((*NETWORKS, "--runs", "0"), "--runs 0 is not between 1 and 100"),
        ((*NETWORKS, "--runs", "101"), "--runs 101 is not between"),
        ((*NETWORKS, "--size", "7"), "--size 7 is not between 8 and 4096"),
        ((*NETWORKS, "--size", "4097"), "--size 4097 is not between"),
        ((*NETWORKS, "--train-teacher", "0"), "--train-teacher 0 is not between"),
        ((*NETWORKS, "--hold-out", "1"), "--hold-out 1 is not a share between 0 and 1"),
        ((*NETWORKS, "--hold-out", "0"), "--hold-out 0 is not a share"),
        ((*NETWORKS, "--seeds", "ten"), "--seeds ten is not a number of epochs to record"),
        ((*NETWORKS, "--seeds", "0"), "--seeds 0 is not a number of epochs"),
        ((*NETWORKS, "--seeds", "3:1"), "--seeds 3:1 is not a number of epochs"),
        ((*NETWORKS, "--method", "kdd"), "--method kdd is not one that learns from one teacher"),
        ((*NETWORKS, "--method", "ps-kd"), "There are kd, logits, dist"),
        ((*NETWORKS, "--set", "epochs=3"), "did you mean train.epochs?"),
        ((*NETWORKS, "--set", "scales=[1,2]"), "did you mean build.scales?"),
        ((*NETWORKS, "--set", "techer.mean=1"), "did you mean teacher?"),
        ((*NETWORKS, "--set", "teacher=1"), "teacher is a section"),
        ((*NETWORKS, "--set", "train.epochs=3"), "--set train.epochs=3: type this as --epochs"),
        ((*NETWORKS, "--set", "build.seeds=3"), "type this as --seeds"),
        ((*NETWORKS, "--set", "augment.size=16"), "--size and --set augment.size: give one"),
    ],
)
def test_a_typing_error_is_one_line_before_anything_is_read_or_written(
    photos, tmp_path, words, says
):
    networks = words[:4]
    weights = () if "weights" in says else ("--train-teacher", "1")
    if "--teacher-checkpoint" in words:
        weights = ()
    ended = distill(photos, tmp_path, *weights, *words[4:], networks=networks)
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert len(ended.err.splitlines()) == 1
    assert says in ended.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ("train.optimizer.lrr=1", "optimizer.lrr: unknown key, did you mean lr?"),
        ("student.modl=1", "student.modl: unknown key, did you mean model?"),
        ("teacher.precison=bfloat16", "teacher.precison: unknown key, did you mean precision?"),
        ("method.temprature=1", "method.temprature: unknown key, did you mean temperature?"),
        ("codec.kind=dens", "codec"),
        ("augment.preset=cifra", "augment"),
        ("dataset.hold_out=7", "dataset: hold_out: Input should be less than 1"),
        ("build.scales=[2]", "scales"),
        ("train.batch_size=0", "batch_size"),
        ("train.seed=3", "seed is set by the experiment"),
    ],
)
def test_a_bad_value_of_a_section_is_one_line_before_anything_is_written(
    photos, checkpoint, tmp_path, section, says
):
    ended = distill(photos, tmp_path, "--teacher-checkpoint", checkpoint, "--set", section)
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert len(ended.err.splitlines()) == 1
    assert says in ended.err
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_there_is_refused_with_those_beside_it(photos, tmp_path):
    ended = distill(photos.parent / "fotos", tmp_path, "--train-teacher", "1")
    assert ended.code == 2
    assert ended.err.endswith("fotos. Close to it: photos.\n")
    ended = distill(photos / "digit-0" / "0.jpg", tmp_path, "--train-teacher", "1")
    assert "0.jpg is a file. Name a folder" in ended.err


def test_a_folder_of_one_class_or_of_none_is_refused(photos, tmp_path):
    one = tmp_path / "one"
    shutil.copytree(photos / "digit-0", one / "digit-0")
    ended = distill(one, tmp_path, "--train-teacher", "1")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "has one class only" in ended.err
    ended = distill(one / "digit-0", tmp_path, "--train-teacher", "1")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "found no class folders" in ended.err
    assert not (tmp_path / "out").exists()


def test_images_for_evaluation_are_checked_before_anything_is_written(photos, tmp_path):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    flat = root / "val"
    flat.mkdir()
    shutil.copy(photos / "digit-0" / "0.jpg", flat)
    ended = distill(root, tmp_path, "--train-teacher", "1")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "evaluation images: dataset folder found no class folders in" in ended.err
    assert "dataset.labels" in ended.err
    shutil.copytree(photos / "digit-0", flat / "digit-9")
    ended = distill(root, tmp_path, "--train-teacher", "1")
    assert (ended.code, len(ended.err.splitlines())) == (2, 1)
    assert "'digit-9'" in ended.err
    assert not (tmp_path / "out").exists()


def test_a_file_of_labels_for_evaluation_is_passed_on(photos, checkpoint, tmp_path):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    (root / "val").mkdir()
    for digit in (0, 1, 4):
        shutil.copy(photos / f"digit-{digit}" / "3.jpg", root / "val" / f"{digit}.jpg")
    rows = "".join(f"{digit}.jpg,digit-{digit}\n" for digit in (0, 1, 4))
    (root / "labels.csv").write_text(f"file,label\n{rows}")
    words = ("--teacher-checkpoint", checkpoint, "--set", "evaluate.dataset.labels=labels.csv")
    ended = distill(root, tmp_path, *words, "--dry-run")
    assert ended.code == 0, ended.err
    assert "90 in 3 classes to learn from, 3 for evaluation" in ended.err


def test_other_images_for_evaluation_in_the_same_out_are_refused(photos, checkpoint, tmp_path):
    root = tmp_path / "split"
    shutil.copytree(photos, root / "train")
    write_photos(root / "val", count=4)
    words = ("--teacher-checkpoint", checkpoint, "--no-baseline")
    assert distill(root, tmp_path, *words).code == 0
    before = kept(tmp_path / "out")
    shutil.copy(photos / "digit-0" / "9.jpg", root / "val" / "digit-0")
    ended = distill(root, tmp_path, *words)
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert "are not those on which" in ended.err
    assert kept(tmp_path / "out") == before
    (root / "val" / "digit-0" / "9.jpg").unlink()
    assert distill(root, tmp_path, *words).code == 0


def test_what_the_folder_holds_and_was_not_taken_is_told(photos, checkpoint, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photos, root)
    (root / "digit-0" / "old.gif").write_bytes(b"GIF89a")
    ended = distill(root, tmp_path, "--teacher-checkpoint", checkpoint, "--dry-run")
    assert ended.code == 0, ended.err
    assert "not taken: " in ended.err
    assert ".gif" in ended.err


def test_an_output_folder_among_the_images_is_refused(photos, monkeypatch):
    monkeypatch.chdir(photos)
    for out in ((), ("--out", "digit-0/out"), ("--out", ".")):
        ended = kd_cache("distill", ".", *NETWORKS, *GIVEN, "--train-teacher", "1", *out)
        assert (ended.code, len(ended.err.splitlines())) == (2, 1)
        assert "lies among the images" in ended.err
    assert sorted(each.name for each in photos.iterdir()) == ["digit-0", "digit-1", "digit-4"]


def test_other_settings_of_a_finished_student_are_refused_before_more_is_recorded(finished, photos):
    out, _, _ = finished
    before = kept(out)
    words = tuple("3" if word == "2" else word for word in QUICK)  # epochs, and so recorded ones
    ended = kd_cache("distill", str(photos), *NETWORKS, *words, "--out", str(out))
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert "epochs=2 there and 3 here" in ended.err
    assert ended.err.endswith("from the same recording, give it a --name.\n")
    assert kept(out) == before


def test_a_named_student_is_trained_beside_the_first_from_the_same_recording(
    finished, photos, tmp_path
):
    shutil.copytree(finished[0], tmp_path / "out")
    words = (*NETWORKS, *QUICK, "--set", "method.temperature=2", "--name", "cool")
    words += ("--no-baseline", "--out", str(tmp_path / "out"))
    ended = kd_cache("distill", str(photos), *words)
    assert ended.code == 0, ended.err
    assert "recorded before" in ended.err
    assert "| cool, kd | " in ended.out
    assert (tmp_path / "out/cool-from-resnet8.html").exists()
    assert (tmp_path / "out/runs/cool/kd/seed-0/student.safetensors").exists()


def test_a_student_that_takes_no_such_images_is_refused_before_anything_is_written(
    photos, checkpoint, tmp_path
):
    networks = ("--teacher", "resnet8", "--student", "vit_tiny_patch16_224")
    ended = distill(photos, tmp_path, "--teacher-checkpoint", checkpoint, networks=networks)
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert "error[" in ended.err.splitlines()[-1]
    assert "224" in ended.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_named_before_anything_is_written(photos, tmp_path):
    root = tmp_path / "damaged"
    shutil.copytree(photos, root)
    (root / "digit-0" / "0.jpg").write_bytes(b"not a JPEG")
    ended = distill(root, tmp_path, "--train-teacher", "1")
    assert (ended.code, len(ended.err.splitlines())) == (3, 1)
    assert "0.jpg" in ended.err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def wide(tmp_path):
    """Weights of a teacher with five outputs."""
    path = tmp_path / "wide.pt"
    torch.save(create_model("resnet8", num_classes=5, seed=0).state_dict(), path)
    return str(path)


def test_a_teacher_of_more_classes_is_refused_and_told_of_teacher_classes(photos, wide, tmp_path):
    for words in ((), ("--set", "teacher.num_classes=5")):
        ended = distill(photos, tmp_path, "--teacher-checkpoint", wide, *words)
        assert (ended.code, ended.out) == (2, ""), ended.err
        assert "teacher.classes" in ended.err.splitlines()[-1]
        assert not (tmp_path / "out").exists()


def test_teacher_classes_chooses_among_more_outputs(photos, checkpoint, tmp_path):
    weights = load_file(checkpoint)
    for name in ("fc.weight", "fc.bias"):  # outputs 1, 4 and 0 are digits 0, 1 and 4
        rows = torch.zeros(5, *weights[name].shape[1:])
        rows[[1, 4, 0]] = weights[name]
        weights[name] = rows
    path = tmp_path / "wide.pt"
    torch.save(weights, path)
    words = ("--teacher-checkpoint", str(path), "--set", "teacher.classes=[1, 4, 0]")
    words += ("--set", "teacher.num_classes=5")
    # The exported file names its preprocessing; a file of weights alone does not.
    for name in ("mean", "std"):
        words += ("--set", f"teacher.{name}=[0.5, 0.5, 0.5]")
    ended = distill(photos, tmp_path, *words, "--no-baseline", "--json")
    assert ended.code == 0, ended.err
    assert rows_of(json.loads(ended.out))["teacher resnet8"]["mean"] > 60


def test_a_teacher_that_guesses_is_refused_before_anything_is_written(photos, tmp_path):
    path = tmp_path / "random.pt"
    torch.save(create_model("resnet8", num_classes=3, seed=0).state_dict(), path)
    ended = distill(photos, tmp_path, "--teacher-checkpoint", str(path))
    assert (ended.code, ended.out) == (3, ""), ended.err
    assert "error[untrained_teacher]" in ended.err
    assert not (tmp_path / "out").exists()


def test_other_images_in_the_same_out_are_refused_with_the_setting_that_helps(
    finished, checkpoint, tmp_path
):
    out, _, _ = finished
    shutil.copytree(out / "recordings", tmp_path / "out" / "recordings")
    other = write_photos(tmp_path / "other", count=20)
    ended = distill(other, tmp_path, "--teacher-checkpoint", checkpoint)
    assert (ended.code, ended.out) == (3, ""), ended.err
    assert "error[spec_mismatch]" in ended.err
    assert "choose another folder with --out" in ended.err.splitlines()[-1]


def test_a_student_that_diverges_is_a_row_with_its_reason_and_exit_code_3(
    photos, checkpoint, tmp_path
):
    networks = ("--teacher", "resnet8", "--student", "support.strokes:overflowing")
    words = ("--teacher-checkpoint", checkpoint, "--set", "student.model_args={side: 16}")
    ended = distill(photos, tmp_path, *words, "--json", networks=networks)
    assert ended.code == 3
    rows = rows_of(json.loads(ended.out))
    assert "is not finite" in rows["support.strokes:overflowing, kd"]["runs"][0]["failure"]
    assert rows["teacher resnet8"]["mean"] > 60


def test_an_out_that_is_a_file_is_one_line(photos, checkpoint, tmp_path):
    (tmp_path / "out").write_text("mine")
    ended = distill(photos, tmp_path, "--teacher-checkpoint", checkpoint)
    assert ended.code != 0
    assert "Traceback" not in ended.err
    assert ended.err.splitlines()[-1].startswith("error[")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_recording_that_does_not_fit_the_disk_is_refused_before_it_begins(
    photos, checkpoint, tmp_path, monkeypatch
):
    # The classes of the photos make tiny rows, so the disk has to be tinier.
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("cli.experiments.distill_folder.run.shutil.disk_usage", lambda _: usage)
    ended = distill(photos, tmp_path, "--teacher-checkpoint", checkpoint)
    assert (ended.code, ended.out) == (4, ""), ended.err
    assert "error[out_of_space]: the recording takes about " in ended.err
    assert not (tmp_path / "out").exists()
