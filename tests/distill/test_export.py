"""The weights that a run leaves for others."""

from __future__ import annotations

import torch
from support.streams import MemoryStream, train_config
from support.toys import NUM_CLASSES

from cache_service.models.create import create_model
from distill.train import train


def test_the_exported_student_is_the_one_that_was_trained(tmp_path):
    config = train_config(tmp_path, channels_last=True)
    result = train(config, stream=MemoryStream(config))
    model = create_model(
        "support.streams:plain_net",
        num_classes=NUM_CLASSES,
        checkpoint=tmp_path / "student.safetensors",
    )
    trained, loaded = result.student.model.state_dict(), model.state_dict()
    torch.testing.assert_close(dict(loaded), dict(trained), rtol=0, atol=0)
