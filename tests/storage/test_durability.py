"""What a power cut may take: nothing that a later write relies on.

Every name that appears is traced: the file was fsynced before, the folder after, and a commit comes
when all that it names is safe.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.caches import make_spec, open_writer, write_cache, write_shard

from cache_service.storage.local import LocalStorage


class Trace:
    """The order of fsync, rename, link and mkdir, by path."""

    def __init__(self, monkeypatch) -> None:
        self.events: list[tuple[str, str]] = []
        self.sources: list[str] = []
        for name, verb in (("replace", "name"), ("link", "name")):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name), verb))
        monkeypatch.setattr(os, "fsync", self._syncing(os.fsync))
        monkeypatch.setattr(os, "mkdir", self._making(os.mkdir))

    def _naming(self, real, verb):
        def call(source, target, **more):
            real(source, target, **more)
            self.sources.append(os.fspath(source))
            self.events.append((verb, os.fspath(target)))

        return call

    def _syncing(self, real):
        def call(handle):
            real(handle)
            self.events.append(("fsync", str(Path(f"/proc/self/fd/{handle}").readlink())))

        return call

    def _making(self, real):
        def call(path, *more, **keywords):
            real(path, *more, **keywords)
            self.events.append(("mkdir", os.fspath(path)))

        return call

    def first(self, event, after=-1) -> int:
        return self.events.index(event, after + 1)

    def named(self) -> list[str]:
        return [path for verb, path in self.events if verb == "name"]


@pytest.fixture
def trace(monkeypatch, tmp_path):
    # The toy disk's own folders are not ours to fsync.
    return Trace(monkeypatch)


def check_order(trace: Trace, root: Path) -> int:
    """Hold every name against the rule; returns how many there were."""
    names = [(i, path) for i, (verb, path) in enumerate(trace.events) if verb == "name"]
    for source, (moment, target) in zip(trace.sources, names, strict=True):
        assert ("fsync", source) in trace.events[:moment], f"{target} named before its file is safe"
        later = trace.events[moment + 1 :]
        assert ("fsync", str(Path(target).parent)) in later, f"{target} named, folder not safe"
        following = [i for i, _ in names if i > moment][:1] or [len(trace.events)]
        assert trace.first(("fsync", str(Path(target).parent)), moment) < following[0], (
            f"the next name appears before that of {target} is safe"
        )
    for moment, (verb, folder) in enumerate(trace.events):
        if verb == "mkdir" and ".scratch" not in folder:
            used = next(i for i, path in names if i > moment and path.startswith(folder + "/"))
            assert trace.first(("fsync", str(Path(folder).parent)), moment) < used, (
                f"{folder} holds an object before the folder itself is safe"
            )
    return len(names)


def test_every_name_appears_after_its_file_is_safe_and_is_safe_before_the_next(trace, tmp_path):
    root = tmp_path / "deep" / "root"
    spec = make_spec(codec={"kind": "features", "num_channels": 6})
    write_cache(str(root), spec, range(2))
    objects = len(LocalStorage(str(root)).list(""))
    assert check_order(trace, root) == objects


def test_a_commit_appears_when_all_that_it_names_is_safe(trace, tmp_path):
    writer = open_writer(str(tmp_path / "root"), make_spec())
    del trace.events[:], trace.sources[:]
    write_shard(writer, 0, 2)
    *data, commit = trace.named()
    assert commit.endswith("commits/0/2.json")
    assert len(data) == 5
    for path in data:
        moment = trace.first(("name", path))
        assert trace.first(("fsync", str(Path(path).parent)), moment) < trace.first(
            ("name", commit)
        )


def test_the_root_document_appears_last(trace, tmp_path):
    root = tmp_path / "root"
    open_writer(str(root), make_spec(codec={"kind": "features", "num_channels": 6}))
    assert trace.named()[-1] == str(root / "zarr.json")


def test_a_deleted_commit_is_gone_for_good(trace, tmp_path):
    storage = LocalStorage(str(tmp_path))
    storage.put("commits/0/0.json", b"")
    del trace.events[:]
    storage.delete("commits/0/0.json")
    assert trace.events == [("fsync", str(tmp_path / "commits" / "0"))]
