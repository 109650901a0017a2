"""The drop-in example does what it says: a student learns from the recording alone."""

from __future__ import annotations

import torch

from cache_service.datasets import DatasetConfig, open_dataset
from examples import own_loop


def test_a_student_learns_from_a_recording_in_a_loop_of_ones_own(tmp_path):
    # Trains two small networks for real, hence a few seconds.
    url = own_loop.record(tmp_path, own_loop.train_teacher(tmp_path, epochs=6))
    torch.manual_seed(0)
    student = own_loop.small_net(width=8)
    digits = open_dataset(DatasetConfig(name="digits"))
    own_loop.train_student(url, digits, student, epochs=6)
    held_out = open_dataset(DatasetConfig(name="digits", split="test"))
    assert own_loop.accuracy(student.eval(), held_out) > 0.6
