"""The process that renders images may hang or crash; that costs images, and nothing else."""

from __future__ import annotations

import sys
import threading
import time

import psutil
import pytest

from cache_service.api.page import images
from cache_service.api.page.images import ImageError, ImageRenderer

ECHO = "import sys\nfor line in sys.stdin: sys.stdout.write(line); sys.stdout.flush()"
CRASH = "import sys\nsys.stdin.readline(); sys.exit(7)"
HANG = "import sys, time\nsys.stdin.readline(); time.sleep(60)"
FLOOD = "import sys\nsys.stdin.readline(); sys.stdout.write('x' * (20 << 20)); sys.stdout.flush()"
ONCE = "import sys\nsys.stdout.write(sys.stdin.readline()); sys.stdout.flush(); sys.exit(1)"


@pytest.fixture
def make():
    made = []

    def make(script, **settings):
        made.append(ImageRenderer(command=(sys.executable, "-S", "-c", script), **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def until(claim, seconds=10):
    ends = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_images_are_rendered_once_and_kept(make):
    renderer = make(ECHO)
    assert renderer.pid is None
    assert renderer.render({"sample": 3}, wait_s=20) == {"sample": 3}
    first = renderer.render({"sample": 3}, wait_s=0)
    assert first is renderer.render({"sample": 3}, wait_s=0)


def test_images_that_are_not_ready_are_requested_again(make):
    renderer = make(HANG)
    begun = time.monotonic()
    assert renderer.render({}, wait_s=0.05) is None
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("script", "says"),
    [(CRASH, "ended with status 7"), (FLOOD, "ended with status"), (HANG, "longer than 0.5 s")],
    ids=["crash", "flood", "hang"],
)
def test_what_goes_wrong_is_reported_and_the_next_request_gets_a_new_process(make, script, says):
    renderer = make(script, timeout_s=0.5 if script is HANG else 30)
    for _ in range(2):
        with pytest.raises(ImageError, match=says):
            renderer.render({}, wait_s=20)
    assert renderer.pid is None


def test_a_process_that_died_between_two_requests_is_replaced(make):
    renderer = make(ONCE)
    assert renderer.render({"n": 1}, wait_s=20) == {"n": 1}
    until(lambda: not alive(renderer.pid))
    assert renderer.render({"n": 2}, wait_s=20) == {"n": 2}


def test_the_process_ends_when_it_is_not_used(make):
    renderer = make(ECHO, idle_s=0.2)
    renderer.render({}, wait_s=20)
    until(lambda: renderer.pid is None)
    assert renderer.render({"n": 2}, wait_s=20) == {"n": 2}


def test_closing_ends_the_process_at_once_also_while_it_renders(make):
    renderer = make(HANG)
    refused = []

    def wait():
        with pytest.raises(ImageError, match="process ended with status") as caught:
            renderer.render({}, wait_s=60)
        refused.append(caught)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: renderer.pid is not None)
    pid = renderer.pid
    begun = time.monotonic()
    renderer.close()
    waiting.join(5)
    assert time.monotonic() - begun < 3
    assert refused
    assert not alive(pid)
    with pytest.raises(ImageError, match="shutting down"):
        renderer.render({"n": 2}, wait_s=0)


def test_too_many_at_once_are_turned_away(make):
    renderer = make(HANG)
    renderer.render({"n": -1}, wait_s=0)
    until(lambda: renderer.pid is not None)
    for number in range(images.MAX_QUEUED):
        assert renderer.render({"n": number}, wait_s=0) is None
    with pytest.raises(ImageError, match="wait to be rendered"):
        renderer.render({"n": 99}, wait_s=0)


def test_few_requests_hold_a_thread_while_they_wait(make):
    renderer = make(HANG)
    threads = [
        threading.Thread(target=renderer.render, args=({},), kwargs={"wait_s": 1.0})
        for _ in range(images.MAX_BLOCKED)
    ]
    for each in threads:
        each.start()
    time.sleep(0.2)
    begun = time.monotonic()
    assert renderer.render({}, wait_s=2.0) is None
    assert time.monotonic() - begun < 0.5
    for each in threads:
        each.join()


def test_the_process_ends_when_its_input_ends(make):
    renderer = make(ECHO)
    renderer.render({}, wait_s=20)
    assert renderer._process.wait(10) == 0
