"""Ranks together read and render the recorded epoch, each position once, and no rank any more."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from support.builds import record_toy
from support.origin import serving
from support.streams import train_config
from support.toys import Patches

from distill.stream import open_stream

CPU = torch.device("cpu")
TOYS = {"name": "support.toys:patches", "args": {"num_samples": 96}}
AUGMENT = {
    "plain": {"preset": "cifar", "size": 16},
    "mixed": {"size": 16, "ops": [{"op": "pad_crop"}, {"op": "mixup"}, {"op": "cutmix"}]},
    "repeated": {"preset": "cifar", "size": 16, "repeats": 2},
}


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divided")
    for name, augment in AUGMENT.items():
        record_toy(str(folder / name), dataset=TOYS, augment=augment)
    return folder


@pytest.fixture
def decoded(monkeypatch):
    """How often each image was decoded."""
    counts, read = Counter(), Patches.__getitem__

    def count(self, index):
        counts[index] += 1
        return read(self, index)

    monkeypatch.setattr(Patches, "__getitem__", count)
    return counts


def views_of(url, world, method, decoded=None, **changes):
    """What all ranks read in three epochs of two seeds, and the images that they decoded for it."""
    config = train_config(
        "unused",
        dataset=TOYS,
        caches=[url] if isinstance(url, str) else url,
        method=method,
        loader="workers",
        epochs=3,
        batch_size=22,
        **changes,
    )
    found, parts = Counter(), []
    for rank in range(world):
        stream = open_stream(config, device=CPU, methods=[config.method], rank=rank, world=world)
        if decoded is not None:
            decoded.clear()
        for batch in stream.batches(0):
            for each in (batch, *batch.other_views.values()):
                for row in range(len(each.labels_B)):
                    tensors = (*each[:5], *(each.rows[0][name] for name in sorted(each.rows[0])))
                    content = b"".join(tensor[row].numpy().tobytes() for tensor in tensors)
                    found[batch.cursor.step, content] += 1
        parts.append(Counter(decoded))
    return found, sum(parts, Counter())


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("augment", "method"),
    [
        ("plain", {"name": "kd"}),
        ("mixed", {"name": "kd"}),
        ("repeated", {"name": "kd"}),
        ("plain", {"name": "ddgsd"}),
        ("plain", {"name": "cs-kd"}),
        ("plain", {"name": "specialist", "classes": [1, 3]}),
    ],
    ids=lambda each: each if isinstance(each, str) else each["name"],
)
def test_the_views_of_all_ranks_are_those_of_one_process(caches, decoded, augment, method, world):
    url = str(caches / augment)
    whole, images = views_of(url, 1, method, decoded)
    divided, images_of_ranks = views_of(url, world, method, decoded)
    assert divided == whole
    if augment == "mixed":
        assert images_of_ranks == images  # no rank renders the partner of another's view


def rows_asked(origin):
    """Rows of all ranges that were requested of a server."""
    spans = [re.findall(r"(?:start|stop)=(\d+)", target) for target in origin.targets("/rows")]
    return sum(int(stop) - int(start) for start, stop in spans)


def test_over_http_each_rank_requests_its_slices_and_the_disk_is_shared(caches, tmp_path):
    whole, _ = views_of(str(caches / "plain"), 1, {"name": "kd"})
    with serving(caches) as origin:
        url = origin.url("plain")
        divided, _ = views_of(url, 2, {"name": "kd"})
        assert divided == whole
        # Both seeds, and a few ranges that were fetched ahead before the distance of slices was
        # known. The third epoch reads in another order, by lookups.
        assert 2 * 96 <= rows_asked(origin) < 3 * 96
        origin.requests.clear()
        on_disk = [{"url": url, "disk_cache": str(tmp_path / "disk")}]
        divided, _ = views_of(on_disk, 2, {"name": "kd"})
        assert divided == whole
        assert rows_asked(origin) == 2 * 96  # both seeds, once for both ranks
