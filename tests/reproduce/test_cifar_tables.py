"""The tables on CIFAR-100 from strips to pages, on drawn colors with tiny networks."""

from __future__ import annotations

import json

import pytest
from support.builds import tree_bytes
from support.command import kd_cache

from cache_service.errors import ConfigError
from cache_service.reader import open_cache
from cli.experiments.reproduce import ddgsd_cifar100, deit_cifar100, sdd_cifar100
from cli.experiments.reproduce.ddgsd_cifar100 import DdgsdSettings
from cli.experiments.reproduce.deit import DeitSettings
from cli.experiments.reproduce.markdown import render_markdown
from cli.experiments.reproduce.order import Order
from cli.experiments.reproduce.school import (
    ImageSettings,
    School,
    TrainingSettings,
    accuracy,
    network,
)
from cli.experiments.reproduce.sdd import METHODS, SddSettings
from cli.experiments.reproduce.small_nets import RESNET
from distill.checkpoint import CHECKPOINT_NAME, load_checkpoint
from distill.metrics import read_metrics
from distill.optim import SGD, AdamW
from distill.schedule import Constant

TINY = network(RESNET, depth=8, widths=[4, 4, 8, 8])
VIT = network("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2)


def training(**changes):
    settings = {"optimizer": SGD(lr=0.05), "schedule": Constant(), "epochs": 3, "batch_size": 8}
    return TrainingSettings(**(settings | changes))


SETTINGS = {
    sdd_cifar100: SddSettings(
        images=ImageSettings(shrink=2), training=training(epochs=2), warmup_epochs=1, recorded=2
    ),
    ddgsd_cifar100: DdgsdSettings(
        images=ImageSettings(shrink=4), network=TINY, training=training()
    ),
    deit_cifar100: DeitSettings(
        images=ImageSettings(shrink=4),
        cnn=TINY,
        vit=VIT,
        cnn_training=training(),
        vit_training=training(optimizer=AdamW(lr=0.02), epochs=2),
        recorded=1,
    ),
}
MODULES = sorted(SETTINGS, key=lambda module: module.NAME)
NAMES = [module.NAME for module in MODULES]


def make_order(out, strips, **changes):
    order = Order(out=str(out), data=str(strips), seeds=1, quick=True, say=lambda line: None)
    return order._replace(**changes)


def kept(out):
    files = tree_bytes(out).items()
    return {key: value for key, value in files if "/cache/" in key or CHECKPOINT_NAME in key}


@pytest.fixture(scope="module")
def finished(strips, tmp_path_factory):
    """A folder and the tables that were made in it, by module: each the first time asked for."""
    out, tables = tmp_path_factory.mktemp("finished"), {}

    def table_of(module):
        if module not in tables:
            tables[module] = module.reproduce(make_order(out, strips), SETTINGS[module])
        return tables[module]

    return out, table_of


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_every_figure_is_measured_beside_the_published_one(finished, module):
    _, table_of = finished
    table = table_of(module)
    page = render_markdown(table)
    for row in table.rows:
        assert row.failures == (), row.what
        assert len(row.runs) == 1
        assert 0 <= row.mean <= 100
    assert table.unit in {"accuracy", "error rate"}
    assert all(goal.met is not None for goal in table.goals)
    assert all(seconds >= 0 for seconds in table.seconds.values())
    assert f"reproduce {module.NAME} --quick --seeds 1" in page
    json.dumps(table.document(), allow_nan=False)


def test_sdd_trains_every_method_on_one_recording(finished):
    out, table_of = finished
    titles = [row.what.rpartition(", ")[2] for row in table_of(sdd_cifar100).rows[1:]]
    assert titles == ["labels", "KD", "DKD", "NKD", "SD-KD", "SD-DKD", "SD-NKD"]
    (folder,) = (out / "quick/sdd-cifar100/recordings").iterdir()
    fingerprint = open_cache(str(folder / "cache")).fingerprint
    runs = sorted((out / "quick/sdd-cifar100").glob("*/sd-*-0"))
    assert len(runs) == 3
    for run in runs:
        assert load_checkpoint(run)["identity"]["caches"] == [fingerprint]


def test_deit_has_one_and_several_tokens_and_two_cycles(finished):
    out, table_of = finished
    what = [row.what for row in table_of(deit_cifar100).rows]
    assert "hard, DeiT + CNN, cycle 2, 3 tokens: top-1" in what
    assert "soft, CNN + CNN, 2 tokens: top-5" in what
    published = {row.what: row.published for row in table_of(deit_cifar100).rows}
    assert published["hard, DeiT: top-1"] == 11.9
    assert published["soft, DeiT + CNN: top-5"] == 1.5
    assert published["soft, DeiT + CNN, 2 tokens: top-5"] is None
    each = load_checkpoint(out / "quick/deit-cifar100/cycle-each-0/round-2/hard")
    assert each["config"]["student"]["model_args"]["num_tokens"] == 3
    assert len(each["identity"]["caches"]) == 3


def test_seconds_that_students_shared_count_once(finished):
    out, table_of = finished
    (seconds,) = table_of(ddgsd_cifar100).seconds.values()
    folder = out / "quick/ddgsd-cifar100/networks"
    spent = [
        [line["epoch_s"] for line in read_metrics(str(folder / name)) if line["kind"] == "epoch"]
        for name in ("ce-0", "ddgsd-0")
    ]
    assert spent[0] == spent[1]
    assert seconds == pytest.approx(sum(spent[0]))


def test_ddgsd_has_fewer_or_more_errors_than_labels_and_says_so(finished):
    _, table_of = finished
    (goal,) = table_of(ddgsd_cifar100).goals
    plain, own = (row.mean for row in table_of(ddgsd_cifar100).rows)
    assert goal.met == (own < plain)
    assert [row.published for row in table_of(ddgsd_cifar100).rows] == [30.15, 26.6]


@pytest.mark.parametrize("module", [ddgsd_cifar100, sdd_cifar100], ids=["ddgsd", "sdd"])
def test_the_same_call_again_trains_and_records_nothing(finished, strips, module):
    out, table_of = finished
    table, before = table_of(module), kept(out)
    said = []
    order = make_order(out, strips, say=said.append)
    assert module.reproduce(order, SETTINGS[module]).rows == table.rows
    assert all(line.endswith(" before") for line in said)
    assert kept(out) == before


def test_another_seed_joins_those_that_are_there(finished, strips):
    out, table_of = finished
    table, said = table_of(ddgsd_cifar100), []
    order = make_order(out, strips, seeds=2, say=said.append)
    more = ddgsd_cifar100.reproduce(order, SETTINGS[ddgsd_cifar100])
    assert [row.runs[0] for row in more.rows] == [row.runs[0] for row in table.rows]
    assert [[run.seed for run in row.runs] for row in more.rows] == [[0, 1], [0, 1]]
    assert [line.partition(": ")[2].partition(":")[0] for line in said] == [
        f"epoch {epoch} of 3" for epoch in (1, 2, 3)
    ]
    assert all("ce-0" not in line for line in said)


def test_a_table_that_was_stopped_goes_on_where_it_was(finished, strips, tmp_path):
    _, table_of = finished

    def stop(line):
        if "epoch 2 of 3" in line:
            raise KeyboardInterrupt

    settings, said = SETTINGS[ddgsd_cifar100], []
    with pytest.raises(KeyboardInterrupt):
        ddgsd_cifar100.reproduce(make_order(tmp_path, strips, say=stop), settings)
    order = make_order(tmp_path, strips, say=said.append)
    assert ddgsd_cifar100.reproduce(order, settings).rows == table_of(ddgsd_cifar100).rows
    assert "epoch 1 of 3" not in "".join(said)


def test_a_student_that_diverges_is_a_failure_and_the_others_are_not(strips, tmp_path):
    images, said = ImageSettings(shrink=4), []
    school = School("some", images, make_order(tmp_path, strips, say=said.append))
    school.open()
    nets = {"good": "cli.experiments.reproduce.mlp:mlp", "bad": "support.strokes:overflowing"}
    students = {
        name: {"student": network(model, side=8), "method": {"name": "ce"}, "seed": 4}
        for name, model in nets.items()
    }
    learns = {"augment": images.augment()}
    outcomes = school.train(students, training(), folder="runs", learns=learns)
    assert outcomes["good"].measured(accuracy).epochs == 3
    failed = outcomes["bad"].measured(accuracy)
    assert (failed.seed, failed.last) == (4, None)
    assert "step 0 is not finite" in failed.failure
    assert any(line.startswith("some runs bad: failed: ") for line in said)


@pytest.mark.parametrize("module", [sdd_cifar100, deit_cifar100], ids=["sdd", "deit"])
def test_without_a_usable_teacher_its_students_are_failures(strips, tmp_path, module):
    idle = training(optimizer=SGD(lr=1e-9), epochs=1)
    training_keys = ("training",) if module is sdd_cifar100 else ("cnn_training", "vit_training")
    settings = SETTINGS[module].model_copy(update=dict.fromkeys(training_keys, idle))
    table = module.reproduce(make_order(tmp_path, strips, seeds=2), settings)
    failed = [row for row in table.rows if row.failures]
    assert len(failed) >= len(METHODS)
    assert {len(row.failures) for row in failed} == {2}
    assert failed[0].failures[0].startswith("no recording: teacher ")
    assert str(tmp_path) not in render_markdown(table)


def test_a_folder_with_other_settings_is_refused(finished, strips):
    out, table_of = finished
    table_of(ddgsd_cifar100)
    other = SETTINGS[ddgsd_cifar100].model_copy(update={"mmd": 0.0})
    with pytest.raises(ConfigError, match=r"other settings: method\.mmd"):
        ddgsd_cifar100.reproduce(make_order(out, strips), other)


def test_the_command_writes_page_and_json(finished, strips, monkeypatch):
    out, table_of = finished
    table_of(ddgsd_cifar100)
    monkeypatch.setattr(ddgsd_cifar100, "QUICK", SETTINGS[ddgsd_cifar100])
    options = ("--quick", "--out", str(out), "--data", str(strips), "--device", "cpu")
    ended = kd_cache("reproduce", "ddgsd-cifar100", *options, "--json")
    assert ended.code == 0, ended.err
    written = json.loads((out / "ddgsd-cifar100-quick.json").read_text())
    assert written["rows"] == json.loads(ended.out)["rows"]
    assert str(out) not in (out / "ddgsd-cifar100-quick.md").read_text()
