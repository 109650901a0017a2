"""Child processes that speak the protocol, break it, hang, die and are replaced."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cache_service import processes
from cache_service.processes import ChildProcess, Supervisor

CHILD = """
import json, os, signal, sys, time
sys.path.insert(0, {root!r})
from cache_service.processes import ParentConnection
parent = ParentConnection()
{script}
"""

ECHO = "for message in parent.messages(): parent.send(message)"
SLEEP = "parent.send({'pid': os.getpid()}); time.sleep(600)"
DEAF = f"signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


@pytest.fixture
def start():
    started = []

    def start(script, **settings):
        root = str(Path(processes.__file__).parents[1])
        text = CHILD.format(root=root, script=script)
        started.append(ChildProcess((sys.executable, "-S", "-c", text), **settings))
        return started[-1]

    yield start
    for child in started:
        child.kill()


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_for_end(child, seconds=20):
    ends = time.monotonic() + seconds
    while (status := child.exit_status()) is None:
        assert time.monotonic() < ends
        time.sleep(0.01)
    return status


def test_messages_go_both_ways_in_order_and_stop_with_the_input(start):
    child = start(ECHO, first_message={"n": 0})
    child.send({"n": 1, "text": "line\nbreak"})
    assert [child.receive(20), child.receive(20)] == [{"n": 0}, {"n": 1, "text": "line\nbreak"}]
    with pytest.raises(TimeoutError):
        child.receive(0.01)
    child.close_input()
    assert child.receive(20) is None
    assert child.receive(20) is None
    assert wait_for_end(child) == 0


def test_what_a_library_prints_does_not_get_between_the_messages(start, caplog):
    caplog.set_level(logging.INFO)
    script = "print('loading'); os.system('echo from a process'); parent.send({'n': 1})"
    child = start(script + "; sys.exit('no such device')", log=logging.getLogger("test"))
    assert wait_for_end(child) == 1
    assert list(child.messages()) == [{"n": 1}]
    assert {"from a process", "loading"} <= {line.split(": ")[1] for line in caplog.messages}
    assert child.last_line() == "no such device"


def test_every_message_is_there_once_the_exit_status_is(start):
    child = start("for n in range(1000): parent.send({'n': n})")
    wait_for_end(child)
    assert [message["n"] for message in child.messages()] == list(range(1000))


@pytest.mark.parametrize("output", ["b'x' * (20 << 20)", "b'not json\\n'", "b'3\\n'"])
def test_a_child_that_breaks_the_protocol_is_killed(start, output):
    child = start(f"os.write(parent._output.fileno(), {output}); time.sleep(600)")
    assert wait_for_end(child) == -signal.SIGKILL
    assert list(child.messages()) == []


def test_a_message_that_was_cut_by_death_is_not_received(start):
    child = start('os.write(parent._output.fileno(), b\'{"n": 1}\\n{"n"\')')
    assert wait_for_end(child) in {0, -signal.SIGKILL}
    assert list(child.messages()) == [{"n": 1}]


def test_sending_to_a_child_that_is_gone_is_no_error(start):
    child = start("pass")
    wait_for_end(child)
    child.send({"n": 1})
    child.kill()
    child.send({"n": 2})


def test_stop_leaves_time_to_end_and_then_kills(start):
    obedient = start(f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); {SLEEP}")
    deaf = start(DEAF)
    pids = [child.receive(20)["pid"] for child in (obedient, deaf)]
    begun = time.monotonic()
    obedient.stop(grace_s=20)
    assert time.monotonic() - begun < 10
    deaf.stop(grace_s=0.1)
    assert not any(map(is_alive, pids))
    assert (obedient.exit_status(), deaf.exit_status()) == (130, -signal.SIGKILL)


def test_a_child_is_asked_to_end_only_once(start):
    count = "signals = []; signal.signal(signal.SIGTERM, lambda *_: signals.append(1))"
    child = start(f"{count}; parent.send({{}}); time.sleep(1); parent.send({{'n': len(signals)}})")
    child.receive(20)
    child.terminate()
    assert child.stop(grace_s=20) == 0  # the second signal would end many a program at once
    assert list(child.messages()) == [{"n": 1}]


def test_killing_a_child_ends_the_processes_that_it_started(start):
    own = "subprocess.Popen(['sleep', '600']).pid"
    child = start(f"import subprocess; parent.send({{'pid': {own}}}); time.sleep(600)")
    pid = child.receive(20)["pid"]
    child.kill()
    assert not is_alive(pid)


def test_a_child_notices_that_its_parent_was_killed(tmp_path):
    script = (
        "import sys\nfrom cache_service.processes import ChildProcess\n"
        "child = ChildProcess((sys.executable, '-c', 'import sys; sys.stdin.read()'))\n"
        "print(child.pid, flush=True)\nimport time\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    ends = time.monotonic() + 20
    while is_alive(pid):
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_child_imports_from_where_its_parent_does(start, tmp_path, monkeypatch):
    (tmp_path / "only_here.py").write_text("NAME = 'found'")
    monkeypatch.syspath_prepend(str(tmp_path))
    child = start("import only_here; parent.send({'name': only_here.NAME})")
    assert child.receive(20) == {"name": "found"}


def test_a_folder_named_like_a_package_in_the_current_one_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "cache_service").mkdir()
    (tmp_path / "cache_service" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    child = ChildProcess(processes.module_command("cache_service.processes"))
    status = wait_for_end(child)
    child.kill()
    assert status == 0


def reports_of(supervisor, seconds=20):
    """Messages until the first failure, and that failure."""
    messages, ends = [], time.monotonic() + seconds
    while time.monotonic() < ends:
        report = supervisor.report()
        messages += report.messages
        if report.failure is not None:
            return messages, report.failure
        time.sleep(0.01)
    raise AssertionError("the child has not failed")


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        ("sys.exit(3)", "status 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9"),
        ("time.sleep(600)", "stalled"),
    ],
)
def test_a_supervisor_reports_why_a_child_failed_after_all_its_messages(start, script, failure):
    supervisor = Supervisor(lambda: start(f"parent.send({{'n': 1}}); {script}"), stall_s=0.5)
    assert reports_of(supervisor) == ([{"n": 1}], failure)


def test_a_child_has_longer_for_its_first_message_than_between_two(start, monkeypatch):
    script = "time.sleep(0.6); parent.send({'n': 1}); time.sleep(600)"
    supervisor = Supervisor(lambda: start(script), stall_s=0.1)
    assert reports_of(supervisor) == ([{"n": 1}], "stalled")
    monkeypatch.setattr(processes, "START_S", 0.1)
    assert supervisor.restart()
    assert reports_of(supervisor) == ([], "stalled")


def test_a_child_is_replaced_a_few_times_and_more_often_with_progress(start):
    supervisor = Supervisor(lambda: start(SLEEP), stall_s=60)
    pids = {supervisor.process.pid}
    for _ in range(processes.MAX_RESTARTS):
        assert supervisor.restart()
        pids.add(supervisor.process.pid)
        supervisor.note_progress(0)
    supervisor.note_progress(1)
    for _ in range(processes.MAX_RESTARTS):
        assert supervisor.restart()
        supervisor.note_progress(1)  # known already
    assert len(pids) == processes.MAX_RESTARTS + 1
    last = supervisor.process.pid
    assert not supervisor.restart()
    assert supervisor.deaths == processes.MAX_RESTARTS + 1
    assert not any(map(is_alive, {*pids, last}))
