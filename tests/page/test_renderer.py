"""The drawing process may hang, crash or lie: it costs a picture, and it never outlives its use."""

from __future__ import annotations

import sys
import threading
import time

import psutil
import pytest

from cache_service.api.page import renderer as module
from cache_service.api.page.renderer import DrawingError, Renderer

ECHO = "import sys\nfor line in sys.stdin: sys.stdout.write(line); sys.stdout.flush()"
CRASH = "import sys\nsys.stdin.readline(); sys.exit(7)"
HANG = "import sys, time\nsys.stdin.readline(); time.sleep(60)"
FLOOD = "import sys\nsys.stdin.readline(); sys.stdout.write('x' * (20 << 20)); sys.stdout.flush()"
ONCE = "import sys\nsys.stdout.write(sys.stdin.readline()); sys.stdout.flush(); sys.exit(1)"


@pytest.fixture
def make():
    made = []

    def make(script, **settings):
        made.append(Renderer(command=(sys.executable, "-S", "-c", script), **settings))
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


def test_a_scene_is_drawn_once_and_remembered(make):
    drawing = make(ECHO)
    assert drawing.pid is None
    assert drawing.scene({"sample": 3}, wait_s=20) == {"sample": 3}
    first = drawing.scene({"sample": 3}, wait_s=0)
    assert first is drawing.scene({"sample": 3}, wait_s=0)


def test_a_scene_that_is_not_ready_is_asked_for_again(make):
    drawing = make(HANG)
    begun = time.monotonic()
    assert drawing.scene({}, wait_s=0.05) is None
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    ("script", "says"),
    [(CRASH, "ended with status 7"), (FLOOD, "ended with status"), (HANG, "longer than 0.5 s")],
    ids=["crash", "flood", "hang"],
)
def test_what_goes_wrong_is_told_and_the_next_request_gets_a_new_process(make, script, says):
    drawing = make(script, timeout_s=0.5 if script is HANG else 30)
    for _ in range(2):
        with pytest.raises(DrawingError, match=says):
            drawing.scene({}, wait_s=20)
    assert drawing.pid is None


def test_a_process_that_died_between_two_scenes_is_replaced(make):
    drawing = make(ONCE)
    assert drawing.scene({"n": 1}, wait_s=20) == {"n": 1}
    until(lambda: not alive(drawing.pid))
    assert drawing.scene({"n": 2}, wait_s=20) == {"n": 2}


def test_the_process_ends_when_nobody_looks(make):
    drawing = make(ECHO, idle_s=0.2)
    drawing.scene({}, wait_s=20)
    until(lambda: drawing.pid is None)
    assert drawing.scene({"n": 2}, wait_s=20) == {"n": 2}


def test_closing_ends_the_process_at_once_also_while_it_draws(make):
    drawing = make(HANG)
    refused = []

    def wait():
        with pytest.raises(DrawingError) as caught:
            drawing.scene({}, wait_s=60)
        refused.append(caught)

    waiting = threading.Thread(target=wait)
    waiting.start()
    until(lambda: drawing.pid is not None)
    pid = drawing.pid
    begun = time.monotonic()
    drawing.close()
    waiting.join(5)
    assert time.monotonic() - begun < 3
    assert refused
    assert not alive(pid)
    with pytest.raises(DrawingError, match="shutting down"):
        drawing.scene({"n": 2}, wait_s=0)


def test_too_many_at_once_are_turned_away(make):
    drawing = make(HANG)
    drawing.scene({"n": -1}, wait_s=0)
    until(lambda: drawing.pid is not None)
    for number in range(module.MAX_WAITING):
        assert drawing.scene({"n": number}, wait_s=0) is None
    with pytest.raises(DrawingError, match="waiting to be drawn"):
        drawing.scene({"n": 99}, wait_s=0)


def test_few_requests_hold_a_thread_while_they_wait(make):
    drawing = make(HANG)
    threads = [
        threading.Thread(target=drawing.scene, args=({},), kwargs={"wait_s": 1.0})
        for _ in range(module.MAX_SEATED)
    ]
    for each in threads:
        each.start()
    time.sleep(0.2)
    begun = time.monotonic()
    assert drawing.scene({}, wait_s=2.0) is None
    assert time.monotonic() - begun < 0.5
    for each in threads:
        each.join()


def test_the_process_ends_with_the_server_that_was_killed(make):
    drawing = make(ECHO)
    drawing.scene({}, wait_s=20)
    process = drawing._process
    process.stdin.close()
    assert process.wait(10) == 0
