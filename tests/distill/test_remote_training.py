"""A student trained over HTTP has the loss curve that the local path gives, whatever goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support.builds import open_toy, record_toy, run_build
from support.ordered import same
from support.origin import serving
from support.proxy import Fault, proxied
from support.sockets import free_port
from support.streams import train_config
from support.toys import patches

from cache_service.errors import SpecMismatchError
from cache_service.rows.reader import open_cache
from cache_service.rows.verify import verify_cache
from distill import CachedDataset, load_cache
from distill.evaluate import evaluate_checkpoint
from distill.reporting import read_metrics
from distill.stream import open_stream
from distill.trainer import train

CPU = torch.device("cpu")

FAULTS = [
    Fault(latency_s=0.003, close_at=12_000),
    Fault(reset_at=3000),
    Fault(close_at=5000),
    Fault(flip_at=2500, close_at=6000),
    Fault(reset_at=0),
    Fault(bytes_per_s=1e6, reset_at=7000),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    record_toy(str(folder / "c"))
    return folder


@pytest.fixture(scope="module")
def wanted(root):
    """Losses of three epochs from the local path."""
    out = root.parent / f"{root.name}-wanted"
    train(config_for(out, str(root / "c")))
    return losses(out)


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
    monkeypatch.delenv("KD_CACHE_TOKEN", raising=False)
    monkeypatch.delenv("KD_CACHE_TOKEN_FILE", raising=False)


def config_for(out, cache, **changes):
    settings = {
        "dataset": {"name": "support.toys:patches", "args": {"num_samples": 96}},
        "caches": cache,
        "student": {"model": "support.streams:normed_net"},
        "method": {"name": "sd-kd"},
        "batch_size": 20,
        "epochs": 3,
    }
    return train_config(out, **(settings | changes))


def losses(out):
    return [line["loss"] for line in read_metrics(str(out)) if line["kind"] == "step"]


def test_ranges_give_the_same_rows_and_losses_as_the_local_path(tmp_path, root, wanted):
    with serving(root) as origin:
        train(config_for(tmp_path / "first", origin.url("c"), epochs=2))
        assert origin.targets("/rows")
        assert not origin.targets("/lookup")
        config = config_for(tmp_path, origin.url("c"))
        here = open_stream(config_for(tmp_path, str(root / "c")), device=CPU).batches(0)
        there = open_stream(config, device=CPU).batches(0)
        for ours, theirs in zip(here, there, strict=True):
            assert ours.rows[0].keys() == theirs.rows[0].keys()
            assert all(
                torch.equal(ours.rows[0][name], theirs.rows[0][name]) for name in ours.rows[0]
            )
        train(config)  # its third epoch reads the first seed in another order
    assert losses(tmp_path / "first") == wanted[: len(wanted) * 2 // 3]
    assert losses(tmp_path) == wanted


def test_lookups_give_the_same_items_as_the_local_path(root):
    images = patches(num_samples=96)
    with serving(root) as origin:
        here = CachedDataset(load_cache(str(root / "c")), images, seed=1)
        there = CachedDataset(load_cache(origin.url("c")), images, seed=1)
        order = np.random.default_rng(0).permutation(96).tolist()
        for low in range(0, 96, 20):
            pairs = zip(
                here.__getitems__(order[low : low + 20]),
                there.__getitems__(order[low : low + 20]),
                strict=True,
            )
            for (image, label, logits), (image2, label2, logits2) in pairs:
                assert torch.equal(image, image2)
                assert label == label2
                assert torch.equal(logits, logits2)
        assert len(origin.targets("/lookup")) == 5
        assert not origin.targets("/rows")


@pytest.mark.faults
def test_loader_workers_read_from_a_server(tmp_path, root):
    # Starts two processes that import torch: the one way to see that they open what is theirs.
    with serving(root) as origin:
        disk = {"url": origin.url("c"), "disk_cache": str(tmp_path / "disk")}
        config = config_for(tmp_path, [disk], workers=2, epochs=1)
        found = list(open_stream(config, device=CPU).batches(0))
    wanted = open_stream(config_for(tmp_path, str(root / "c"), epochs=1), device=CPU).batches(0)
    for ours, theirs in zip(wanted, found, strict=True):
        assert all(torch.equal(ours.rows[0][name], theirs.rows[0][name]) for name in ours.rows[0])
    assert len(origin.targets("/rows")) == 3  # one a shard, for both workers


def test_a_bad_line_does_not_bend_the_curve(tmp_path, root, wanted):
    with serving(root) as origin, proxied(origin.server_address[1], FAULTS) as proxy:
        train(config_for(tmp_path, f"http://127.0.0.1:{proxy.port}/v1/caches/c"))
        assert proxy.connections > 3
    assert losses(tmp_path) == wanted


def test_a_stopped_run_goes_on_over_http_bit_for_bit(tmp_path, root, wanted):
    def stop(event):
        if event.kind == "step" and event.step == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with serving(root) as origin:
        with pytest.raises(KeyboardInterrupt):
            train(config_for(tmp_path, origin.url("c")), on_event=stop)
        train(config_for(tmp_path, origin.url("c")))
    assert losses(tmp_path) == wanted


def test_a_run_that_began_at_a_path_goes_on_over_http(tmp_path, root, wanted):
    def stop(event):
        if event.kind == "step" and event.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(config_for(tmp_path, str(root / "c")), on_event=stop)
    with serving(root) as origin:
        train(config_for(tmp_path, [{"url": origin.url("c"), "wait_s": 1}]))
    assert losses(tmp_path) == wanted


@pytest.mark.parametrize("where", ["path", "url"])
def test_a_trainer_that_follows_a_build_gets_the_losses_of_one_that_came_later(
    tmp_path, wanted, where
):
    build = open_toy(str(tmp_path / "c"))
    run_build(build, seeds=(0,))
    rest = threading.Thread(target=lambda: run_build(build, seeds=(1,)))
    with serving(tmp_path) as origin:
        url = str(tmp_path / "c") if where == "path" else origin.url("c")
        assert open_cache(str(tmp_path / "c")).complete_seeds() == [0]

        def begin(event):
            if event.kind == "step" and event.step == 3:
                rest.start()

        train(config_for(tmp_path / "out", [{"url": url, "wait_s": 60}]), on_event=begin)
        rest.join()
    assert losses(tmp_path / "out") == wanted


def test_a_student_is_scored_on_a_cache_behind_a_url(tmp_path, root):
    train(config_for(tmp_path, str(root / "c"), epochs=1))
    here = evaluate_checkpoint(str(tmp_path), cache=str(root / "c"))
    with serving(root) as origin:
        assert evaluate_checkpoint(str(tmp_path), cache=origin.url("c")) == here
        assert verify_cache(open_cache(origin.url("c"))).rows_checked == 192


def test_another_fingerprint_behind_a_url_is_refused(tmp_path, root):
    with serving(root) as origin:
        cache = {"url": origin.url("c"), "fingerprint": "0" * 64}
        with pytest.raises(SpecMismatchError, match=f"but {'0' * 64} was requested"):
            train(config_for(tmp_path, [cache]))


@pytest.mark.parametrize(
    ("cache", "said"),
    [
        ({"url": "c", "wait_s": -1}, r"wait_s\s+Input should be greater than or equal to 0"),
        ({"url": "c", "wait_s": 86_401}, r"wait_s\s+Input should be less than or equal to 86400"),
        (
            {"url": "c", "disk_cache": "d"},
            "disk_cache is for servers and buckets, and c is a folder",
        ),
        (
            {"url": "http://h/c", "disk_cache": ""},
            r"disk_cache\s+String should have at least 1 character",
        ),
        (
            {"url": "http://h/c", "disk_cache": "d", "disk_cache_bytes": -1},
            r"disk_cache_bytes\s+Input should be greater than or equal to 0",
        ),
        (
            {"url": "http://h/c", "disk_cache": "d", "disk_cache_bytes": 2**61},
            rf"disk_cache_bytes\s+Input should be less than or equal to {2**60}",
        ),
        ({"url": "http://h/c", "token": "x"}, r"token\s+Extra inputs are not permitted"),
    ],
)
def test_settings_of_a_cache_out_of_their_bounds_are_refused(tmp_path, cache, said):
    with pytest.raises(ValidationError, match=said):
        config_for(tmp_path, [cache])


ORIGIN = ("-m", "support.origin")
START = """
import sys
root, port = sys.argv[1:]
sys.argv = ["kd-cache", "serve", root, "--port", port]
from cli.main import run
run()
"""
SERVICE = ("-c", START)


class Restarted:
    """A server in a process, killed without warning and started again."""

    def __init__(self, root, program):
        self._root = root
        self._program = program
        self.port = free_port()
        self.kills = 0
        self.start()

    def start(self):
        command = [sys.executable, *self._program, str(self._root), str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def restart(self):
        self.kill()
        self.kills += 1
        time.sleep(0.2)
        self.start()


def trained_through_restarts(out, root, kills, program):
    """Longest time between two steps, with the server killed so often in the first epoch."""
    server = Restarted(root, program)
    stamps = []

    def on_event(event):
        if event.kind == "step":
            stamps.append(time.monotonic())
            if server.kills < kills and event.step % 2 == 0:
                server.restart()

    try:
        url = f"http://127.0.0.1:{server.port}/v1/caches/c"
        train(config_for(out, url, batch_size=8, epochs=2), on_event=on_event)
    finally:
        server.kill()
    assert server.kills == kills
    return float(np.diff(stamps).max())


def test_a_server_that_is_killed_and_started_again_does_not_bend_the_curve(tmp_path, root):
    train(config_for(tmp_path / "local", str(root / "c"), batch_size=8, epochs=2))
    stall_s = trained_through_restarts(tmp_path / "remote", root, kills=1, program=ORIGIN)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert stall_s < 15


@pytest.mark.faults
def test_five_kills_in_an_epoch_do_not_bend_the_curve(tmp_path, root):
    train(config_for(tmp_path / "local", str(root / "c"), batch_size=8, epochs=2))
    stall_s = trained_through_restarts(tmp_path / "remote", root, kills=5, program=SERVICE)
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert stall_s < 15


@pytest.mark.faults
def test_twenty_epochs_over_a_bad_line_have_the_curve_of_a_clean_one(tmp_path, root):
    settings = {"epochs": 20, "batch_size": 12}
    train(config_for(tmp_path / "local", str(root / "c"), **settings))
    with serving(root) as origin, proxied(origin.server_address[1], FAULTS) as proxy:
        url = f"http://127.0.0.1:{proxy.port}/v1/caches/c"
        train(config_for(tmp_path / "remote", url, **settings))
        assert proxy.connections > 20
        cache, folder = load_cache(url), open_cache(str(root / "c"))
        for _ in range(20):
            numbers = np.random.default_rng(1).permutation(96)[:40]
            assert same(cache.lookup(0, numbers), folder.lookup(0, numbers))
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
