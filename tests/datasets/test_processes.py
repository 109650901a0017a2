from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest

from cache_service.datasets import DatasetConfig, open_dataset, wrap_dataset
from cache_service.errors import DatasetError, UnreadableSampleError

FACTORY = """
from pathlib import Path
import numpy as np

class Noise:
    def __init__(self, count):
        self.pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
        self.targets = [number % 7 for number in range(count)]
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):
        return self.pixels[index], self.targets[index]

def noise(root):
    return Noise(int((Path(root) / "count").read_text()))
"""


@pytest.fixture
def noise(tmp_path):
    (tmp_path / "noise.py").write_text(FACTORY)
    (tmp_path / "count").write_text("2000")
    return open_dataset(DatasetConfig(name=f"{tmp_path}/noise.py:noise", root=str(tmp_path)))


def test_a_spawned_worker_reads_the_same_pixels_and_raises_the_same_refusals(folder, noise):
    files = open_dataset(DatasetConfig(name="folder", root=str(folder)))
    # One start of a fresh interpreter: about a second.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        for dataset, sample in ((files, 7), (noise, 1999)):
            there = pool.submit(dataset.image, sample).result()
            assert there.tobytes() == dataset.image(sample).tobytes()
        (folder / "ant" / "0.png").unlink()
        with pytest.raises(UnreadableSampleError, match="sample 0"):
            pool.submit(files.image, 0).result()


def test_a_pickled_dataset_leaves_its_pixels_behind(noise):
    assert len(pickle.dumps(noise)) < 30_000  # 16 kB of labels, and not 6 MB of pixels
    assert pickle.loads(pickle.dumps(noise)).id == noise.id


def test_a_dataset_of_the_users_own_travels_whole():
    items = [(np.full((4, 4), number, np.uint8), number % 2) for number in range(6)]
    there = pickle.loads(pickle.dumps(wrap_dataset(items)))
    assert there.image(5).getpixel((0, 0)) == (5, 5, 5)


def test_a_dataset_that_changed_under_way_is_refused(noise, tmp_path):
    packed = pickle.dumps(noise)
    (tmp_path / "count").write_text("1999")
    with pytest.raises(DatasetError, match="had 2000 samples when it was opened, and has 1999"):
        pickle.loads(packed).image(0)


def test_folders_and_digits_open_without_torch(folder):
    program = f"""
import sys
from cache_service.datasets import DatasetConfig, open_dataset
open_dataset(DatasetConfig(name="folder", root={str(folder)!r})).image(0)
open_dataset(DatasetConfig(name="digits")).image(0)
assert not {{"torch", "timm", "torchvision"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
