"""The weights that a run leaves for others."""

from __future__ import annotations

import struct

import torch
from safetensors import safe_open
from support.streams import MemoryStream, plain_net, train_config
from support.toys import NUM_CLASSES

from cache_service.format.spec import Preprocess
from cache_service.models.create import create_model
from cache_service.models.preprocess import recorded_preprocess
from cache_service.models.weights import load_checkpoint
from distill.export import export_student
from distill.students import Student
from distill.trainer import train


def test_the_exported_student_is_the_one_that_was_trained(tmp_path):
    config = train_config(tmp_path, channels_last=True)
    result = train(config, stream=MemoryStream(config))
    model = create_model("support.streams:plain_net", num_classes=NUM_CLASSES)
    load_checkpoint(model, tmp_path / "student.safetensors")
    trained, loaded = result.student.model.state_dict(), model.state_dict()
    torch.testing.assert_close(dict(loaded), dict(trained), rtol=0, atol=0)


def test_equal_students_are_equal_files_that_the_library_reads(tmp_path):
    torch.manual_seed(0)
    seen = Preprocess(size=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    student = Student(plain_net().half(), seen)
    files = set()
    # Their library alone has one order of three metadata out of six each time.
    for _ in range(20):
        export_student(
            str(tmp_path), student, name='a "net" \N{BULLET}', num_classes=5, view_size=8
        )
        files.add((tmp_path / "student.safetensors").read_bytes())
    assert len(files) == 1
    (length,) = struct.unpack("<Q", next(iter(files))[:8])
    assert length % 8 == 0
    path = tmp_path / "student.safetensors"
    assert recorded_preprocess(path) == seen
    with safe_open(path, framework="pt") as opened:
        facts = opened.metadata()
        found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
    assert (facts["model"], facts["num_classes"]) == ('a "net" \N{BULLET}', "5")
    torch.testing.assert_close(found, dict(student.model.state_dict()), rtol=0, atol=0)
